"""The pgvector tables: their names and definition, what each is recorded to hold, and what is refused.

Searches read `TABLE`. `BESIDE` is built while they do, and takes its place whole and indexed (see `swap`); what `TABLE`
held before another model took its place stays as `KEPT`. What is recorded of a table goes by its name.
"""

from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy import text

from songvec_assets.errors import DatabaseError, TableMismatchError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import check_search_path, lock_key, read_fact, write_fact
from songvec_assets.settings import OFFLINE_MODEL

TABLE, BESIDE, KEPT = "song_embeddings", "song_embeddings_new", "song_embeddings_old"
_SPEC, _CHANGES = "table", "rows_changed_since_index"
FACTS = (_SPEC, _CHANGES, "index", "building", "probes", "recall")
"""The names of all facts about a table."""


@dataclass(frozen=True)
class TableSpec:
    """What the table holds.

    Attributes:
        model: the embedding model's name.
        dimensions: values a vector.
        vector_type: `vector` or `halfvec`.
        query_prompt, document_prompt: see `Prompts`; None: not recorded. Another one makes no other table.
    """

    model: str
    dimensions: int
    vector_type: str = "vector"
    query_prompt: str | None = field(default=None, compare=False)
    document_prompt: str | None = field(default=None, compare=False)

    @property
    def column_type(self) -> str:
        """The column's type as Postgres writes it."""
        return f"{self.vector_type}({self.dimensions})"

    def __str__(self) -> str:
        return f"{self.column_type} by {self.model}"


def index_name(table: str = TABLE) -> str:
    """The index of a table."""
    return f"embeddings_ivfflat_idx{table.removeprefix(TABLE)}"


def fact_key(name: str, table: str = TABLE) -> str:
    """Where a fact about a table is in `songvec.settings`: the serving table's facts have the plain names."""
    return name if table == TABLE else f"{table}.{name}"


def define_table(spec: TableSpec, table: str = TABLE) -> sa.Table:
    """A table as SQLAlchemy sees it."""
    vector = {"vector": VECTOR, "halfvec": HALFVEC}[spec.vector_type](spec.dimensions)
    return sa.Table(
        table,
        sa.MetaData(),
        sa.Column("song_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("embedding", vector, nullable=False),
        sa.Column("created_at", sa.TIMESTAMP, nullable=False, server_default=sa.func.now()),
    )


def table_exists(connection: sa.Connection, table: str) -> bool:
    """Whether there is one of that name in the schemas searched."""
    return bool(connection.scalar(text("SELECT to_regclass(:name) IS NOT NULL"), {"name": table}))


def check_table(database: Database, spec: TableSpec) -> None:
    """Refuse a serving table that holds something else than `spec`.

    Raises:
        TableMismatchError: another model, size or type; or the table has other columns than ours.
        DatabaseError: there is none, and this user may not create one.
    """
    with database.get_connection() as connection:
        if not gives_way(database, connection, spec):
            _check_table(connection, spec, TABLE)


def ensure_table(database: Database, spec: TableSpec, table: str = TABLE) -> bool:
    """Create a table where there is none, else check it. The embedded database's offline table gives way.

    Returns:
        Whether it was created.

    Raises:
        TableMismatchError: see `check_table`.
    """
    with database.get_connection() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key("table")})
        if gives_way(database, connection, spec, table):
            drop_table(connection, table)
        elif _check_table(connection, spec, table):
            _record_spec(connection, spec, table)
            return False
        forget_table(connection, table)
        _search_schema_of_serving_table(connection)
        define_table(spec, table).create(connection)
        # a vector of 2,000 values then stays in its row's page: no TOAST look-ups, and parallel index builds
        connection.execute(text(f"ALTER TABLE {table} ALTER COLUMN embedding SET STORAGE PLAIN"))
        _record_spec(connection, spec, table)
        return True


def _search_schema_of_serving_table(connection: sa.Connection) -> None:
    """Let this transaction create tables where the serving one is, which need not be the first schema searched."""
    connection.execute(
        text("""
            SELECT set_config('search_path', relnamespace::regnamespace || ', ' || current_setting('search_path'), true)
            FROM pg_class WHERE oid = to_regclass(:table)
        """),
        {"table": TABLE},
    )


def drop_table(connection: sa.Connection, table: str) -> None:
    """Drop a table, and what is recorded of it."""
    connection.execute(text(f"DROP TABLE IF EXISTS {table}"))
    forget_table(connection, table)


def forget_table(connection: sa.Connection, table: str) -> None:
    """Remove what is recorded of a table: there is none of that name."""
    connection.execute(text("DELETE FROM songvec.loaded_ranges WHERE table_name = :table"), {"table": table})
    for name in FACTS:
        connection.execute(text("DELETE FROM songvec.settings WHERE key = :key"), {"key": fact_key(name, table)})


def _record_spec(connection: sa.Connection, spec: TableSpec, table: str) -> None:
    prompts = {"query_prompt": spec.query_prompt, "document_prompt": spec.document_prompt}
    fact = {"model": spec.model, "column_type": spec.column_type, **prompts}
    if read_fact(connection, fact_key(_SPEC, table)) != fact:
        write_fact(connection, fact_key(_SPEC, table), fact)


def gives_way(database: Database, connection: sa.Connection, spec: TableSpec, table: str = TABLE) -> bool:
    """Whether the table holds offline vectors of the embedded database, and something better comes."""
    loaded = read_spec(connection, table)
    return database.embedded and loaded is not None and loaded.model == OFFLINE_MODEL and loaded != spec


def read_spec(connection: sa.Connection, table: str = TABLE) -> TableSpec | None:
    """What a table is recorded to hold, or None before a first load."""
    fact: Any = read_fact(connection, fact_key(_SPEC, table))
    if fact is None:
        return None
    vector_type, _, dimensions = fact["column_type"].rstrip(")").partition("(")
    prompts = fact.get("query_prompt"), fact.get("document_prompt")
    return TableSpec(fact["model"], int(dimensions), vector_type, *prompts)


def loaded_spec(database: Database) -> TableSpec | None:
    """What searches find, or None before a first load."""
    with database.get_connection() as connection:
        return read_spec(connection)


def describe_tables(database: Database) -> dict[str, str]:
    """What each table that is there holds, by its name."""
    with database.get_connection() as connection:
        there = [table for table in (TABLE, BESIDE, KEPT) if table_exists(connection, table)]
        return {table: str(read_spec(connection, table) or "nothing that was loaded") for table in there}


def count_changes(connection: sa.Connection, n_rows: int, table: str = TABLE) -> None:
    """Add to the rows changed since the index was built. Last in a transaction: others wait for its row."""
    connection.execute(
        text("""
            INSERT INTO songvec.settings (key, value) VALUES (:key, to_jsonb(CAST(:n_rows AS bigint)))
            ON CONFLICT (key) DO UPDATE SET value = to_jsonb(settings.value::bigint + :n_rows)
        """),
        {"key": fact_key(_CHANGES, table), "n_rows": n_rows},
    )


def read_changes(connection: sa.Connection, table: str = TABLE) -> int:
    """Rows written or deleted since the index was built."""
    return int(read_fact(connection, fact_key(_CHANGES, table)) or 0)


def _check_table(connection: sa.Connection, spec: TableSpec, table: str) -> bool:
    """Whether the table exists; raises where it does not fit."""
    check_search_path(connection)
    rows = connection.execute(
        text("""
            SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
            WHERE attrelid = to_regclass(:name) AND attnum > 0 AND NOT attisdropped
        """),
        {"name": table},
    )
    columns: dict[str, str] = {name: kind for name, kind in rows}  # noqa: C416 - rows are no pairs to mypy
    if not columns:
        if not connection.scalar(text("SELECT has_schema_privilege(current_schema(), 'CREATE')")):
            raise DatabaseError(
                f"this user may not create table {table} in the schema its search_path names first: let the owner run "
                "GRANT CREATE ON SCHEMA … TO …, or use another user in POSTGRES_URL"
            )
        return False
    expected = {"song_id": "integer", "embedding": spec.column_type}
    wrong = {name: columns.get(name, "missing") for name, kind in expected.items() if columns.get(name) != kind}
    if wrong:
        raise TableMismatchError(
            f"table {table} has {wrong}, expected {expected}: set SONGVEC_EMBEDDING_DIMENSIONS and SONGVEC_VECTOR_TYPE "
            "to what it holds, or let `songvec swap` build the new one beside it and put it in its place"
        )
    loaded = read_spec(connection, table)
    n_ranges = connection.scalar(
        text("SELECT count(*) FROM songvec.loaded_ranges WHERE table_name = :table"), {"table": table}
    )
    if loaded is not None and loaded.model != spec.model and n_ranges:
        raise TableMismatchError(
            f"table {table} holds vectors of {loaded.model!r}, the configured model is {spec.model!r}: one table holds "
            f"one model. Set SONGVEC_EMBEDDING_MODEL={loaded.model}, or let `songvec swap` build the new one beside it "
            "and put it in its place"
        )
    return True
