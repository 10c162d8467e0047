"""The pgvector table: its definition, what it is recorded to hold, and what is refused."""

from dataclasses import dataclass

import sqlalchemy as sa
from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy import text

from songvec_assets.errors import DatabaseError, TableMismatchError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema, lock_key, read_fact, write_fact
from songvec_assets.settings import OFFLINE_MODEL

TABLE = "song_embeddings"
_FACT = "table"
CHANGES_FACT = "rows_changed_since_index"


@dataclass(frozen=True)
class TableSpec:
    """What the table holds.

    Attributes:
        model: the embedding model's name.
        dimensions: values a vector.
        vector_type: `vector` or `halfvec`.
    """

    model: str
    dimensions: int
    vector_type: str = "vector"

    @property
    def column_type(self) -> str:
        """The column's type as Postgres writes it."""
        return f"{self.vector_type}({self.dimensions})"


def define_table(spec: TableSpec) -> sa.Table:
    """The table as SQLAlchemy sees it."""
    vector = {"vector": VECTOR, "halfvec": HALFVEC}[spec.vector_type](spec.dimensions)
    return sa.Table(
        TABLE,
        sa.MetaData(),
        sa.Column("song_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("embedding", vector, nullable=False),
        sa.Column("created_at", sa.TIMESTAMP, nullable=False, server_default=sa.func.now()),
    )


def check_table(database: Database, spec: TableSpec) -> None:
    """Refuse a table that holds something else than `spec`, before anything is paid for.

    Raises:
        TableMismatchError: another model, size or type; or the table has other columns than ours.
    """
    with database.get_connection() as connection:
        if not _gives_way(database, connection, spec):
            _check_table(connection, spec)


def ensure_table(database: Database, spec: TableSpec) -> None:
    """Create the table where there is none, else check it. The embedded database's offline table gives way.

    Raises:
        TableMismatchError: see `check_table`.
    """
    ensure_schema(database)
    with database.get_connection() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key("table")})
        if _gives_way(database, connection, spec):
            connection.execute(text("DROP TABLE IF EXISTS song_embeddings"))
        elif _check_table(connection, spec):
            _record_spec(connection, spec)
            return
        define_table(spec).create(connection)
        # a vector of 2,000 values then stays in its row's page: no TOAST look-ups, and parallel index builds
        connection.execute(text("ALTER TABLE song_embeddings ALTER COLUMN embedding SET STORAGE PLAIN"))
        connection.execute(text("DELETE FROM songvec.loaded_ranges"))
        _record_spec(connection, spec)


def _record_spec(connection: sa.Connection, spec: TableSpec) -> None:
    if _loaded_spec(connection) != spec:
        write_fact(connection, _FACT, {"model": spec.model, "column_type": spec.column_type})


def _gives_way(database: Database, connection: sa.Connection, spec: TableSpec) -> bool:
    """Whether the table holds offline vectors of the embedded database, and something better comes."""
    loaded = _loaded_spec(connection)
    return database.embedded and loaded is not None and loaded.model == OFFLINE_MODEL and loaded != spec


def _loaded_spec(connection: sa.Connection) -> TableSpec | None:
    fact = read_fact(connection, _FACT)
    if fact is None:
        return None
    vector_type, _, dimensions = fact["column_type"].rstrip(")").partition("(")
    return TableSpec(fact["model"], int(dimensions), vector_type)


def loaded_spec(database: Database) -> TableSpec | None:
    """What the table is recorded to hold, or None before a first load."""
    with database.get_connection() as connection:
        return _loaded_spec(connection)


def _check_table(connection: sa.Connection, spec: TableSpec) -> bool:
    """Whether the table exists; raises where it does not fit."""
    rows = connection.execute(
        text("""
            SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
            WHERE attrelid = to_regclass(:name) AND attnum > 0 AND NOT attisdropped
        """),
        {"name": TABLE},
    )
    columns: dict[str, str] = {name: kind for name, kind in rows}  # noqa: C416 - rows are no pairs to mypy
    if not columns:
        if not connection.scalar(text("SELECT has_schema_privilege(current_schema(), 'CREATE')")):
            raise DatabaseError(
                f"this user may not create table {TABLE} in the schema its search_path names first: let the owner run "
                "GRANT CREATE ON SCHEMA … TO …, or use another user in POSTGRES_URL"
            )
        return False
    expected = {"song_id": "integer", "embedding": spec.column_type}
    wrong = {name: columns.get(name, "missing") for name, kind in expected.items() if columns.get(name) != kind}
    if wrong:
        raise TableMismatchError(
            f"table {TABLE} has {wrong}, expected {expected}: set SONGVEC_EMBEDDING_DIMENSIONS and SONGVEC_VECTOR_TYPE "
            f"to what it holds, or drop the table to have a new one filled from the cache"
        )
    loaded = _loaded_spec(connection)
    n_ranges = connection.scalar(text("SELECT count(*) FROM songvec.loaded_ranges"))
    if loaded is not None and loaded.model != spec.model and n_ranges:
        raise TableMismatchError(
            f"table {TABLE} holds vectors of {loaded.model!r}, the configured model is {spec.model!r}: one table holds "
            f"one model. Set SONGVEC_EMBEDDING_MODEL={loaded.model}, or drop the table to have a new one filled"
        )
    return True
