-- Searches in SQL: songvec.search and songvec.similar, with the rights of the caller. Python calls the same functions.
-- This file can be run again: DROP EXTENSION vector CASCADE drops the functions that take a vector.

-- the type is found wherever the extension is
SELECT set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), quote_ident(nspname)), true)
FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'vector';

-- A text without accents, as few type them: letters are decomposed, and their marks dropped. Postgres can do so in UTF-8
-- only; elsewhere accents count. Indexes are made of this function and of the next one: both must never change.
DO $do$ BEGIN
    IF getdatabaseencoding() = 'UTF8' THEN
        CREATE OR REPLACE FUNCTION songvec.plain(words text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT CASE WHEN octet_length(words) = length(words) THEN words
                ELSE normalize(regexp_replace(normalize(words, NFD), '[\u0300-\u036f]', '', 'g')) END
        $$;
    ELSE
        CREATE OR REPLACE FUNCTION songvec.plain(words text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT words
        $$;
    END IF;
END $do$;

-- What a search by words reads of a song.
CREATE OR REPLACE FUNCTION songvec.title(name text, artist text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT songvec.plain(coalesce(name, '') || ' ' || coalesce(artist, ''))
$$;

-- SQLSTATE SONGV: the search was refused; the detail is the error's code in docs/operations.md.
CREATE OR REPLACE FUNCTION songvec.refuse(code text, message text) RETURNS void
LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'SONGV', MESSAGE = message, DETAIL = code; END $$;

-- The serving table's name for SQL, locked until the transaction ends: a swap ends before or begins after.
CREATE OR REPLACE FUNCTION songvec.lock_table(source jsonb) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE name CONSTANT text := quote_ident(source ->> 'schema') || '.song_embeddings';
BEGIN
    IF name IS NULL OR to_regclass(name) IS NULL THEN
        PERFORM songvec.refuse('table.not-loaded', 'nothing is loaded yet, so nothing can be found: `songvec run` first');
    END IF;
    -- by its name: another table may have it when the lock is granted
    EXECUTE format('LOCK TABLE %s IN ACCESS SHARE MODE', name);
    RETURN name;
END $$;

-- The SQL of a filter over the songs table `s`: names are quoted, and values are literals of the column's type.
CREATE OR REPLACE FUNCTION songvec.condition(filter jsonb, source jsonb) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE part jsonb; name text; operator text; value text; is_list boolean; kind text; condition text := 'true';
BEGIN
    IF jsonb_typeof(filter) IS DISTINCT FROM 'array' THEN
        PERFORM songvec.refuse('search.invalid', format('expected a filter like [["artist", "=", "Ann"]], got %s', filter));
    END IF;
    FOR part IN SELECT jsonb_array_elements(filter) LOOP
        name := part ->> 0; operator := part ->> 1; value := part ->> 2; is_list := jsonb_typeof(part -> 2) = 'array';
        -- without its modifier: a cast to varchar(n) would shorten a longer value
        SELECT format_type(atttypid, -1) INTO kind FROM pg_attribute
        WHERE attrelid = (source ->> 'songs')::regclass AND attname = name AND attnum > 0
            AND (source -> 'columns' ? name OR name = source ->> 'song_id');
        IF kind IS NULL THEN
            PERFORM songvec.refuse('search.column', format(
                'expected a filter of %s, got %s: list the column in SONGVEC_FILTER_COLUMNS, then run `songvec load`',
                source ->> 'columns', coalesce(name, part::text)));
        ELSIF operator = 'in' AND is_list AND jsonb_array_length(part -> 2) <= 1000 THEN
            condition := condition || format(' AND s.%I = ANY (%L::%s[])', name,
                ARRAY(SELECT jsonb_array_elements_text(part -> 2)), kind);
        ELSIF operator IN ('=', '<>', '<', '<=', '>', '>=') AND value IS NOT NULL AND NOT is_list THEN
            condition := condition || format(' AND s.%I %s %L::%s', name, operator, value, kind);
        ELSIF operator IN ('contains', 'starts') AND value IS NOT NULL AND NOT is_list THEN
            value := regexp_replace(value, '([\\%_])', '\\\1', 'g') || '%';
            condition := condition || format(' AND s.%I::text ILIKE %L', name,
                CASE operator WHEN 'contains' THEN '%' ELSE '' END || value);
        ELSE
            PERFORM songvec.refuse('search.invalid', 'expected a column, an operator (=, <>, <, <=, >, >=, contains, '
                'starts, or in with up to 1000 values) and a value, got ' || left(part::text, 200));
        END IF;
    END LOOP;
    RETURN condition;
END $$;

-- The songs whose name and artist have all the words or, with pg_trgm, are spelled like them: those called exactly so,
-- the best spelled, those that have the words in their order, the shortest.
-- With less memory the places of a common word's matches become pages, all of whose songs are parsed.
CREATE OR REPLACE FUNCTION songvec.match(words text, n integer, filter jsonb, source jsonb) RETURNS integer[]
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET work_mem = '64MB' AS $$
DECLARE
    songs CONSTANT regclass := source ->> 'songs';
    name CONSTANT text := CASE WHEN source ->> 'name' IS NULL THEN 'NULL' ELSE format('s.%I::text', source ->> 'name') END;
    artist CONSTANT text := CASE WHEN source ->> 'artist' IS NULL THEN 'NULL'
        ELSE format('s.%I::text', source ->> 'artist') END;
    title CONSTANT text := format('songvec.title(%s, %s)', name, artist);
    -- One word is compared with whole words: else "tea" would be spelled like "Teapot". Several are compared with any part
    -- of a title: one of them can be half of it.
    is_word CONSTANT boolean := trim(words) !~ '\s';
    similarity CONSTANT text := CASE WHEN is_word THEN 'strict_word_similarity' ELSE 'word_similarity' END;
    is_small boolean; has_words boolean; has_spelling boolean; trgm text; matching integer[];
BEGIN
    SELECT c.reltuples < 50000 OR c.relkind = 'v', coalesce(bool_or(o.opcname = 'tsvector_ops'), false),
        coalesce(bool_or(o.opcname LIKE '%\_trgm\_ops'), false) INTO is_small, has_words, has_spelling
    FROM pg_class c LEFT JOIN (
        pg_depend d JOIN pg_index i ON i.indexrelid = d.objid AND i.indisvalid
        JOIN pg_opclass o ON o.oid = ANY (i.indclass::oid[])
    ) ON i.indrelid = c.oid AND d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_proc'::regclass
        AND d.refobjid = 'songvec.title(text, text)'::regprocedure
    WHERE c.oid = songs GROUP BY c.oid, c.reltuples, c.relkind;
    IF NOT (is_small OR has_words) THEN
        PERFORM songvec.refuse('search.no-index', format(
            'a search by words would read all of %s: let its owner run CREATE INDEX CONCURRENTLY ON %s USING gin '
            '(to_tsvector(''simple'', %s)); or search with mode = vector', songs, songs, replace(title, 's.', '')));
    END IF;
    SELECT home.nspname INTO trgm FROM pg_extension x JOIN pg_namespace home ON home.oid = x.extnamespace
    WHERE x.extname = 'pg_trgm' AND (is_small OR has_spelling);
    -- a common word matches millions: of them only lengths are compared, and no text is parsed again
    EXECUTE format(
        'SELECT array_agg(id ORDER BY place) FROM (
            SELECT s.%1$I::integer AS id, row_number() OVER (
                ORDER BY lower(%2$s) = lower($1) DESC NULLS LAST, %3$s strpos(lower(%4$s), lower($3)) = 0, length(%4$s), s.%1$I
            ) AS place
            FROM %5$s s WHERE (to_tsvector(''simple'', %4$s) @@ plainto_tsquery(''simple'', $3) %6$s) AND %7$s
            ORDER BY place LIMIT $2
        ) AS found', source ->> 'song_id', name,
        CASE WHEN trgm IS NULL THEN '' ELSE format('%I.%s($3, %s) DESC,', trgm, similarity, title) END, title, songs,
        CASE WHEN trgm IS NULL THEN '' ELSE
            format('OR %s OPERATOR(%I.%s) $3', title, trgm, CASE WHEN is_word THEN '%>>' ELSE '%>' END) END,
        songvec.condition(filter, source)) INTO matching USING trim(words), n, songvec.plain(trim(words));
    RETURN matching;
END $$;

-- How a table's rows nearest to a vector are found: the method of its index, NULL if it has none that is valid; whether
-- that index finds candidates by bits; and SQL for their song_ids and exact distances, nearest first.
--   $1  the vector; $2 how many; $3 how many candidates, which are $2 unless they are found by bits
-- The index says itself of what it was made, and the query is made alike. Each index of bits has a function of its own,
-- so an index and a query of different means never meet. STABLE: as its caller's statement sees the catalog.
CREATE OR REPLACE FUNCTION songvec.nearest_sql(
    serving regclass, index text, filter jsonb DEFAULT '[]', source jsonb DEFAULT NULL,
    OUT method text, OUT is_bits boolean, OUT statement text
) LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET quote_all_identifiers = off AS $$
DECLARE home text; kind text; made_of text; condition text := 'true';
BEGIN
    SELECT n.nspname INTO home FROM pg_extension x JOIN pg_namespace n ON n.oid = x.extnamespace WHERE x.extname = 'vector';
    SELECT format_type(c.atttypid, c.atttypmod) INTO kind FROM pg_attribute c
    WHERE c.attrelid = serving AND c.attname = 'embedding';
    SELECT a.amname, k.atttypid = 'bit'::regtype, pg_get_indexdef(i.indexrelid, 1, false) INTO method, is_bits, made_of
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam
    JOIN pg_attribute k ON k.attrelid = c.oid AND k.attnum = 1
    WHERE i.indrelid = serving AND c.relname = index AND i.indisvalid AND a.amname IN ('ivfflat', 'hnsw');
    IF made_of IS NULL THEN  -- there is none, or it was dropped since: all rows are compared
        method := NULL; is_bits := false; made_of := 'embedding';
    END IF;
    IF source IS NOT NULL THEN
        condition := format('EXISTS (SELECT FROM %s s WHERE s.%I = e.song_id AND %s)', (source ->> 'songs')::regclass,
            source ->> 'song_id', songvec.condition(filter, source));
    END IF;
    -- + 0: in relaxed order the planner takes rows for sorted that are not
    statement := format(
        'SELECT song_id, distance FROM (
            SELECT e.song_id, e.embedding OPERATOR(%1$I.<=>) $1::%2$s AS distance FROM %3$s e WHERE %4$s
            ORDER BY %5$s OPERATOR(%1$I.%6$s) %7$s LIMIT $3
        ) AS candidates ORDER BY distance + 0, song_id LIMIT $2', home, kind, serving, condition, made_of,
        CASE WHEN is_bits THEN '<~>' ELSE '<=>' END, regexp_replace(made_of, '\membedding\M', '($1::' || kind || ')'));
END $$;

-- The songs nearest to a vector, those whose name and artist match words, or, given both, the two lists fused.
--   query   by the table's model, of a text within the model's prompt
--   k       songs at most, up to 1,000
--   filter  conditions that all hold, such as [["artist", "=", "Ann"], ["year", "in", [1990, 1991]]]
--   model   that made the query; NULL: not checked
--   source  the songs table; NULL: as the last load recorded it
-- VOLATILE, so that each statement sees what is committed: once the table is locked, its records are those of its rows.
CREATE OR REPLACE FUNCTION songvec.search(
    query vector, k integer DEFAULT 10, words text DEFAULT NULL, filter jsonb DEFAULT '[]', model text DEFAULT NULL,
    source jsonb DEFAULT NULL
) RETURNS TABLE (song_id integer, similarity double precision, vector_rank bigint, text_rank bigint)
LANGUAGE plpgsql VOLATILE ROWS 10 SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    knobs CONSTANT text[] := '{ivfflat.probes,ivfflat.iterative_scan,ivfflat.max_probes,hnsw.ef_search,hnsw.iterative_scan}';
    serving text; facts jsonb; kind text[]; distance text; found record; saved text[];
    gather CONSTANT text := 'SELECT array_agg(song_id ORDER BY distance, song_id) FROM (%s) AS found';
    n_wanted integer := k; n_candidates integer; nearest integer[]; matching integer[];
BEGIN
    IF k IS NULL OR k NOT BETWEEN 1 AND 1000 THEN
        PERFORM songvec.refuse('search.invalid', format('expected a limit from 1 to 1000, got %s', k));
    ELSIF query IS NULL AND coalesce(trim(words), '') = '' THEN
        PERFORM songvec.refuse('search.invalid', 'the query is empty: expected words, a song or a vector');
    ELSIF length(words) > 4000 THEN
        PERFORM songvec.refuse('search.invalid', format('expected up to 4000 characters, got %s', length(words)));
    END IF;
    source := coalesce(source, (SELECT s.value FROM songvec.settings s WHERE s.key = 'search'));
    serving := songvec.lock_table(source);
    SELECT s.value INTO facts FROM songvec.settings s WHERE s.key = 'table';
    kind := regexp_match(facts ->> 'column_type', '^(vector|halfvec)\((\d+)\)$');
    IF kind IS NULL THEN
        PERFORM songvec.refuse('table.not-loaded', 'nothing is loaded yet, so nothing can be found: `songvec run` first');
    ELSIF model <> facts ->> 'model' THEN
        PERFORM songvec.refuse('table.mismatch', format('the table holds vectors by %L, the query''s is by %L: embed it by '
            'the table''s model, or let `songvec swap` build the other one''s table', facts ->> 'model', model));
    ELSIF cardinality(query::real[]) <> kind[2]::integer THEN
        PERFORM songvec.refuse('table.mismatch', format('the table holds vectors of %s values, the query''s has %s',
            kind[2], cardinality(query::real[])));
    ELSIF 0 = ALL (query::real[]) THEN
        PERFORM songvec.refuse('search.invalid', 'the query''s vector is zero: it is near to nothing');
    END IF;
    SELECT format('e.embedding OPERATOR(%I.<=>) $1::%I.%I', n.nspname, n.nspname, kind[1]) INTO distance
    FROM pg_extension x JOIN pg_namespace n ON n.oid = x.extnamespace WHERE x.extname = 'vector';
    IF words IS NOT NULL THEN
        n_wanted := greatest(k, 50);
        matching := songvec.match(words, n_wanted, filter, source);
    END IF;
    IF query IS NOT NULL THEN
        -- saved and restored by hand: CREATE FUNCTION ... SET ivfflat.probes fails for those who do not own the extension
        SELECT array_agg(current_setting(x.knob, true) ORDER BY x.place) INTO saved
        FROM unnest(knobs) WITH ORDINALITY AS x (knob, place);
        -- one statement: the index and what is recorded of it change together
        SELECT plan.*, (SELECT s.value #>> '{}' FROM songvec.settings s WHERE s.key = 'probes') AS probes,
            (SELECT s.value #>> '{}' FROM songvec.settings s WHERE s.key = 'candidates')::integer AS candidates
        INTO found FROM songvec.nearest_sql(serving::regclass, 'embeddings_ivfflat_idx', filter, source) AS plan;
        -- those recorded were measured for ten rows; the more are wanted, the smaller is the share that bits put too far
        n_candidates := greatest(n_wanted, CASE WHEN found.is_bits
            THEN ceil(coalesce(found.candidates, 400) * (greatest(n_wanted, 10) / 10.0) ^ 0.75) END);
        PERFORM set_config('ivfflat.probes', found.probes, true) WHERE found.method = 'ivfflat' AND found.probes IS NOT NULL;
        PERFORM set_config('hnsw.ef_search', least(n_candidates, 1000)::text, true) WHERE found.method = 'hnsw';
        -- a scan that found too few rows goes on to further lists, up to all of them; before pgvector 0.8 it cannot
        PERFORM set_config('ivfflat.iterative_scan', 'relaxed_order', true), set_config('ivfflat.max_probes', '32768', true),
            set_config('hnsw.iterative_scan', 'relaxed_order', true)
        WHERE saved[2] IS NOT NULL;
        EXECUTE format(gather, found.statement) INTO nearest USING query, n_wanted, n_candidates;
        IF coalesce(cardinality(nearest), 0) < n_wanted AND (saved[2] IS NULL OR found.method = 'hnsw') THEN
            PERFORM set_config('ivfflat.probes', '32768', true);
            IF found.method = 'hnsw' THEN  -- a scan of a graph ends early: what it did not reach is found without it
                SELECT * INTO found FROM songvec.nearest_sql(serving::regclass, NULL, filter, source);
            END IF;
            EXECUTE format(gather, found.statement) INTO nearest USING query, n_wanted, n_candidates;
        END IF;
        PERFORM set_config(x.knob, saved[x.place], true) FROM unnest(knobs) WITH ORDINALITY AS x (knob, place)
        WHERE saved[x.place] IS NOT NULL;
    END IF;
    -- reciprocal rank fusion, with the constant of Cormack et al. (2009); of equals, a match comes first
    RETURN QUERY EXECUTE format(
        'SELECT song_id, 1 - (%s), v.rank, t.rank
        FROM unnest($2) WITH ORDINALITY AS v (song_id, rank)
        FULL JOIN unnest($3) WITH ORDINALITY AS t (song_id, rank) USING (song_id)
        LEFT JOIN %s e USING (song_id)
        ORDER BY coalesce(1.0 / (60 + v.rank), 0) + coalesce(1.0 / (60 + t.rank), 0) DESC, t.rank, v.rank LIMIT $4',
        distance, serving) USING query, nearest, matching, k;
END $$;

-- The songs nearest to a song of the table, without itself; see songvec.search.
CREATE OR REPLACE FUNCTION songvec.similar(
    song integer, k integer DEFAULT 10, filter jsonb DEFAULT '[]', source jsonb DEFAULT NULL
) RETURNS TABLE (song_id integer, similarity double precision, vector_rank bigint, text_rank bigint)
LANGUAGE plpgsql VOLATILE ROWS 10 SET search_path = pg_catalog, pg_temp AS $$
DECLARE serving text; home text; is_known boolean;
BEGIN
    source := coalesce(source, (SELECT s.value FROM songvec.settings s WHERE s.key = 'search'));
    serving := songvec.lock_table(source);
    EXECUTE format('SELECT EXISTS (SELECT FROM %s e WHERE e.song_id = $1)', serving) INTO is_known USING song;
    IF NOT is_known THEN
        PERFORM songvec.refuse('search.unknown-song', format('song %s has no vector in the table', song));
    END IF;
    SELECT n.nspname INTO home FROM pg_extension x JOIN pg_namespace n ON n.oid = x.extnamespace WHERE x.extname = 'vector';
    RETURN QUERY EXECUTE format(
        'SELECT found.* FROM %s e, songvec.search(e.embedding::%I.vector, $2, NULL, $3, NULL, $4) found WHERE e.song_id = $1',
        serving, home)
    USING song, k, filter || jsonb_build_array(jsonb_build_array(source ->> 'song_id', '<>', song)), source;
END $$;
