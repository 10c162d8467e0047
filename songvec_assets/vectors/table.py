"""The pgvector tables: their names, definition, rows and recorded metadata, and which index each has.

Searches read the `SERVING` table. A `STAGING` table is loaded and indexed while they do, and then replaces it (see
`swap`); the `PREVIOUS` table is what served before another model replaced it. When to add here: another fact that is
read or recorded about one table. Keep out: what is loaded by range (`ledger`), and everything that reads, builds or
measures an index (`index/`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import sqlalchemy as sa
from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy import text

from songvec_assets.errors import DatabaseError, TableMismatchError
from songvec_assets.postgres import extension, locks
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import LOCAL_MODELS
from songvec_assets.songs.counts import IdSums
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.index.catalog import BuiltIndex, IndexInfo, find_index
from songvec_assets.vectors.ledger import Records
from songvec_assets.vectors.spec import PREVIOUS, SERVING, STAGING, TableSpec, read_serving, read_spec, write_spec

_ID_SUMS = IdSums.columns("song_id")


def define_table(spec: TableSpec, name: str = SERVING) -> sa.Table:
    """A table as SQLAlchemy sees it."""
    vector = {"vector": VECTOR, "halfvec": HALFVEC}[spec.vector_type](spec.dimensions)
    return sa.Table(
        name,
        sa.MetaData(),
        sa.Column("song_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("embedding", vector, nullable=False),
        sa.Column("created_at", sa.TIMESTAMP, nullable=False, server_default=sa.func.now()),
    )


@dataclass(frozen=True)
class VectorTable(Records):
    """One table of embeddings, with what is recorded about it: `VectorTable(database).spec` is what searches find."""

    @property
    def index_name(self) -> str:
        """The name of its index."""
        return f"embeddings_ivfflat_idx{self.name.removeprefix(SERVING)}"

    @property
    def building_index(self) -> str:
        """The name of an index while it is built, until it replaces the one that searches use."""
        return f"{self.index_name}_building"

    @property
    def replaced_index(self) -> str:
        """The name of an index that was replaced, until it is dropped."""
        return f"{self.index_name}_replaced"

    @property
    def spec(self) -> TableSpec | None:
        """What the table holds, as recorded; None before a first load."""
        with self.database.get_connection("web") as connection:  # each search reads it: by a pooled connection
            return self.read_spec(connection)

    @property
    def is_indexed(self) -> bool:
        """Whether it has a valid index."""
        with self.database.get_connection() as connection:
            return self.find_index(connection) is not None

    @property
    def index(self) -> IndexInfo | None:
        """Its valid index, or None."""
        with self.database.get_connection() as connection:
            found = self.find_index(connection)
            if found is None:
                return None
            n_rows = (self.read(connection, "index", BuiltIndex) or BuiltIndex()).n_rows
            recorded = self.read_changes(connection), self.read_probes(connection), self.read_candidates(connection)
            return IndexInfo.of(found, n_rows, *recorded)

    def read_spec(self, connection: sa.Connection) -> TableSpec | None:
        """See `spec`; within the connection's transaction."""
        return read_spec(connection, self.name)

    def find_index(self, connection: sa.Connection) -> "sa.Row[Any] | None":
        """Its index as the catalog has it; see `catalog.find_index`."""
        return find_index(connection, self.name, self.index_name)

    # rows

    def exists(self, connection: sa.Connection) -> bool:
        """Whether there is a table of this name in the schemas searched."""
        return bool(connection.scalar(text("SELECT to_regclass(:name) IS NOT NULL"), {"name": self.name}))

    def count_rows(self) -> int:
        """Its number of rows; 0 if there is no such table."""
        with self.database.get_connection() as connection:
            if not self.exists(connection):
                return 0
            return int(connection.scalar(text(f"SELECT count(*) FROM {self.name}")) or 0)

    def read_id_sums(self, tiling: Tiling) -> tuple[dict[SongIdRange, IdSums], IdSums]:
        """Its rows by range, and those with a negative song_id, by a scan of its primary key; none without a table."""
        with self.database.get_connection() as connection:
            if not self.exists(connection):
                return {}, IdSums()
            rows = connection.execute(
                text(f"""
                    SELECT CASE WHEN song_id < 0 THEN -1 ELSE least(song_id, :stop) / :width END AS tile, {_ID_SUMS}
                    FROM {self.name} GROUP BY tile
                """),
                {"stop": tiling.stop, "width": tiling.width},
            )
            found = {tile: IdSums(*counts) for tile, *counts in rows}
        below = found.pop(-1, IdSums())
        return {tiling.range_of(tile * tiling.width): counts for tile, counts in found.items()}, below

    def read_id_sums_of(self, connection: sa.Connection, song_range: SongIdRange) -> IdSums:
        """Its rows of one range."""
        n_rows, *sums = connection.execute(
            text(f"SELECT {_ID_SUMS} FROM {self.name} WHERE song_id >= :start AND song_id < :stop"),
            {"start": song_range.start, "stop": song_range.stop},
        ).one()
        return IdSums(n_rows, *(each or 0 for each in sums))

    # making, checking, renaming and dropping

    def ensure(self, spec: TableSpec, models: Collection[str] | None = None) -> bool:
        """Create it if it is missing, else check it. The demo's table in the embedded database is replaced.

        Args:
            models: of the loaded ranges; None: they are read from the ledger.

        Returns:
            Whether it was created.

        Raises:
            TableMismatchError: see `check`.
        """
        with self.database.get_connection() as connection:
            locks.wait_for_lock(connection, "table")
            if self.is_replaceable(connection, spec):
                self.drop(connection)
            elif self._check(connection, spec, models):
                write_spec(connection, self.name, spec)
                return False
            self.forget(connection)
            search_schema_of_serving_table(connection)
            define_table(spec, self.name).create(connection)
            # keeps a vector of 2,000 values in its row's page: no TOAST look-ups, and parallel index builds
            connection.execute(text(f"ALTER TABLE {self.name} ALTER COLUMN embedding SET STORAGE PLAIN"))
            write_spec(connection, self.name, spec)
            return True

    def check(self, spec: TableSpec, models: Collection[str] | None = None) -> None:
        """Refuse a table that holds something other than `spec`; for the arguments see `ensure`.

        Raises:
            TableMismatchError: another model, size or type; or the table has other columns than ours.
            DatabaseError: there is none, and this user may not create one.
        """
        with self.database.get_connection() as connection:
            if not self.is_replaceable(connection, spec):
                self._check(connection, spec, models)

    def is_replaceable(self, connection: sa.Connection, spec: TableSpec) -> bool:
        """Whether it holds a local model's vectors in the embedded database, and other ones are to be loaded."""
        loaded = self.read_spec(connection)
        return self.database.embedded and loaded is not None and loaded.model in LOCAL_MODELS and loaded != spec

    def _check(self, connection: sa.Connection, spec: TableSpec, models: Collection[str] | None) -> bool:
        """Whether the table exists; raises if it does not fit."""
        extension.check_search_path(connection)
        rows = connection.execute(
            text("""
                SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
                WHERE attrelid = to_regclass(:name) AND attnum > 0 AND NOT attisdropped
            """),
            {"name": self.name},
        )
        columns: dict[str, str] = {name: kind for name, kind in rows}  # noqa: C416 - rows are no pairs to mypy
        if not columns:
            if not connection.scalar(text("SELECT has_schema_privilege(current_schema(), 'CREATE')")):
                raise DatabaseError(
                    f"this user may not create table {self.name} in the schema its search_path names first: let the "
                    "owner run GRANT CREATE ON SCHEMA … TO …, or use another user in POSTGRES_URL",
                    "database.no-right",
                )
            return False
        expected = {"song_id": "integer", "embedding": spec.column_type}
        wrong = {name: columns.get(name, "missing") for name, kind in expected.items() if columns.get(name) != kind}
        if wrong:
            raise TableMismatchError(
                f"table {self.name} has {wrong}, expected {expected}: set SONGVEC_EMBEDDING_DIMENSIONS and "
                "SONGVEC_VECTOR_TYPE to what it holds, or let `songvec swap` build a staging table and replace it"
            )
        # the ledger names the model of each range, even if the record of the whole table cannot be read
        if models is None:
            models = {entry.model for entry in self.ledger.read(connection).values()}
        if others := set(models) - {spec.model}:
            held = min(others)
            raise TableMismatchError(
                f"table {self.name} holds vectors of {held!r}, the configured model is {spec.model!r}: one table holds "
                f"one model. Set SONGVEC_EMBEDDING_MODEL={held}; or, if the provider calls the same model otherwise, "
                f"SONGVEC_MODEL_ID={held}; or let `songvec swap` build a staging table and replace it"
            )
        return True

    def rename_to(self, connection: sa.Connection, name: str) -> None:
        """Rename it, its indexes and all that is recorded about it; no table of the new name may exist."""
        new = VectorTable(self.database, name)
        new.forget(connection)
        connection.execute(text(f"ALTER TABLE {self.name} RENAME TO {name}"))
        for index, renamed in {f"{self.name}_pkey": f"{name}_pkey", self.index_name: new.index_name}.items():
            connection.execute(text(f"ALTER INDEX IF EXISTS {index} RENAME TO {renamed}"))
        self.rename_records(connection, name)

    def drop(self, connection: sa.Connection) -> None:
        """Drop it if it exists, and what is recorded about it."""
        connection.execute(text(f"DROP TABLE IF EXISTS {self.name}"))
        self.forget(connection)


def describe_tables(database: Database) -> dict[str, str]:
    """What each table that exists holds, by its name."""
    with database.get_connection() as connection:
        tables = [VectorTable(database, name) for name in (SERVING, STAGING, PREVIOUS)]
        return {
            table.name: str(table.read_spec(connection) or "nothing that was loaded")
            for table in tables
            if table.exists(connection)
        }


def read_embeddings(database: Database, song_ids: Collection[int]) -> pl.DataFrame:
    """The vectors that the table holds of some songs, by song_id; songs without one are left out.

    Returns:
        Columns song_id (Int32) and embedding (Array of Float32, dimensions).

    Raises:
        TableMismatchError: nothing is loaded yet.
    """
    with database.get_connection("web") as connection:
        n_values = read_serving(connection).dimensions
        extension.check_search_path(connection)
        rows = connection.execute(
            text(f"""
                SELECT song_id, vector_send(embedding::vector) FROM {SERVING}
                WHERE song_id = ANY (:song_ids) ORDER BY song_id
            """),
            {"song_ids": [int(song_id) for song_id in song_ids]},
        ).all()
    # pgvector sends two 16-bit integers, then the values, all big-endian
    values = np.frombuffer(b"".join(content[4:] for _, content in rows), dtype=">f4").astype(np.float32)
    return pl.DataFrame(
        {"song_id": [song_id for song_id, _ in rows], "embedding": values.reshape(-1, n_values)},
        {"song_id": pl.Int32, "embedding": pl.Array(pl.Float32, n_values)},
    )


def search_schema_of_serving_table(connection: sa.Connection) -> None:
    """Let this transaction create tables in the serving table's schema, which need not be the first one searched."""
    connection.execute(
        text("""
            SELECT set_config('search_path', concat_ws(
                ', ', relnamespace::regnamespace::text, nullif(current_setting('search_path'), '')
            ), true)
            FROM pg_class WHERE oid = to_regclass(:table)
        """),
        {"table": SERVING},
    )
