-- The tables of schema songvec. Written so that it also completes those of releases that recorded no version.
CREATE SCHEMA IF NOT EXISTS songvec;
CREATE TABLE IF NOT EXISTS songvec.settings (
    key text PRIMARY KEY,
    value jsonb NOT NULL
);
CREATE TABLE IF NOT EXISTS songvec.rate_limits (
    name text PRIMARY KEY
);
ALTER TABLE songvec.rate_limits
    ADD COLUMN IF NOT EXISTS requests_at timestamptz NOT NULL DEFAULT 'epoch',
    ADD COLUMN IF NOT EXISTS tokens_at timestamptz NOT NULL DEFAULT 'epoch',
    ADD COLUMN IF NOT EXISTS paused_until timestamptz NOT NULL DEFAULT 'epoch',
    ADD COLUMN IF NOT EXISTS busy_since timestamptz NOT NULL DEFAULT 'epoch',
    ADD COLUMN IF NOT EXISTS slowed_at timestamptz NOT NULL DEFAULT 'epoch',
    ADD COLUMN IF NOT EXISTS share double precision NOT NULL DEFAULT 1,
    ADD COLUMN IF NOT EXISTS seen_at timestamptz NOT NULL DEFAULT 'epoch',
    ADD COLUMN IF NOT EXISTS ahead_s double precision NOT NULL DEFAULT 0;
CREATE TABLE IF NOT EXISTS songvec.rate_seconds (
    name text,
    slot smallint,
    second bigint NOT NULL,
    n_requests bigint NOT NULL,
    n_tokens bigint NOT NULL,
    PRIMARY KEY (name, slot)
);
CREATE TABLE IF NOT EXISTS songvec.loaded_ranges (
    range_start bigint NOT NULL,
    range_stop bigint NOT NULL,
    model text NOT NULL,
    dimensions integer NOT NULL,
    n_songs integer NOT NULL,
    digest bytea NOT NULL,
    song_ids bytea NOT NULL,
    checksums bytea NOT NULL,
    loaded_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE songvec.loaded_ranges
    ADD COLUMN IF NOT EXISTS table_name text NOT NULL DEFAULT 'song_embeddings',
    DROP CONSTRAINT IF EXISTS loaded_ranges_pkey,
    ADD PRIMARY KEY (table_name, range_start, range_stop);
CREATE TABLE IF NOT EXISTS songvec.budgets (
    name text PRIMARY KEY,
    updated_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE songvec.budgets
    DROP COLUMN IF EXISTS n_tokens,
    ADD COLUMN IF NOT EXISTS usd numeric NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS reserved_usd numeric NOT NULL DEFAULT 0;
