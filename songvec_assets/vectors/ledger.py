"""The ledger of what is loaded into a table, by range: `songvec.loaded_ranges`.

A range's row names every song_id and checksum that the table holds for it, and is written in the transaction that
loads them: 12 bytes per song, compared with 8,008 in the table. When to add here: another question about what is
loaded. Keep out: what the table itself holds (`table`).
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import polars as pl
import sqlalchemy as sa
import xxhash
from sqlalchemy import text

from songvec_assets.cache.manifest import digest_rows
from songvec_assets.postgres import schema
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import has_tables
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.spec import SERVING, TableSpec, metadata_key

_METADATA = ("table", "rows_changed_since_index", "index", "building", "probes", "candidates", "recall")
_CHANGES = "rows_changed_since_index"

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class LedgerEntry:
    """A summary of what is loaded of a range; equal entries mean equal rows.

    Attributes:
        n_songs: rows.
        digest: of their song_ids and checksums.
        model, dimensions: that made the vectors.
    """

    n_songs: int
    digest: bytes
    model: str = field(default="", compare=False)
    dimensions: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Ledger:
    """The ledger of one table. Each method reads in the connection's transaction, or in a new one."""

    database: Database
    table: str

    def _select(self, columns: str, song_range: SongIdRange | None, connection: sa.Connection | None) -> Sequence[Any]:
        opened = self.database.get_connection() if connection is None else contextlib.nullcontext(connection)
        with opened as connected:
            if not has_tables(connected):
                return []
            condition, values = "table_name = :table", {"table": self.table}
            if song_range:
                condition += " AND (range_start, range_stop) = (:start, :stop)"
                values |= asdict(song_range)
            statement = text(f"SELECT {columns} FROM songvec.loaded_ranges WHERE {condition}")
            return connected.execute(statement, values).all()

    def read(self, connection: sa.Connection | None = None) -> dict[SongIdRange, LedgerEntry]:
        """What is loaded, by range: all rows at once, without their song_ids."""
        rows = self._select("range_start, range_stop, n_songs, digest, model, dimensions", None, connection)
        return {
            SongIdRange(start, stop): LedgerEntry(n_songs, bytes(digest), model, dimensions)
            for start, stop, n_songs, digest, model, dimensions in rows
        }

    def count_songs(self) -> int:
        """Rows that are loaded, over all ranges."""
        return sum(entry.n_songs for entry in self.read().values())

    def read_rows(self, song_range: SongIdRange, connection: sa.Connection | None = None) -> pl.DataFrame | None:
        """The rows (song_id Int32, checksum UInt64) loaded of a range; None: the range was never loaded."""
        found = self._select("song_ids, checksums", song_range, connection)
        if not found:
            return None
        song_ids, checksums = found[0]
        return pl.DataFrame({"song_id": np.frombuffer(song_ids, "<i4"), "checksum": np.frombuffer(checksums, "<u8")})

    def read_song_ids(self, song_range: SongIdRange) -> pl.Series:
        """The songs loaded of a range; empty if it was never loaded."""
        rows = self.read_rows(song_range)
        return pl.Series("song_id", [], dtype=pl.Int32) if rows is None else rows["song_id"]

    def read_models(self) -> Counter[tuple[str, int]]:
        """Number of loaded songs by model and dimensions."""
        models = Counter[tuple[str, int]]()
        for entry in self.read().values():
            models[entry.model, entry.dimensions] += entry.n_songs
        return models

    def find_ranges(self, tiling: Tiling) -> set[SongIdRange]:
        """The ranges of the loaded songs, as song_ids are divided now: the ledger may still have an earlier tail."""
        ranges = set()
        for song_range, entry in self.read().items():
            if song_range in tiling:
                ranges.add(song_range)
            elif entry.n_songs:
                starts = (self.read_song_ids(song_range) // tiling.width).unique() * tiling.width
                ranges.update(map(tiling.range_of, starts))
        return ranges

    def digest(self, spec: TableSpec) -> str:
        """An identity of all that is loaded."""
        state = xxhash.xxh3_128(str(spec).encode())
        for song_range, entry in sorted(self.read().items()):
            state.update(f"{song_range.key} {entry.digest.hex()}\n".encode())
        return state.hexdigest()

    def write(self, connection: sa.Connection, song_range: SongIdRange, vectors: pl.DataFrame, spec: TableSpec) -> None:
        """Record a range as loaded with these rows (song_id, checksum), within the transaction that loads them."""
        bounds = {"table": self.table, "start": song_range.start, "stop": song_range.stop}
        # a raised stop leaves the row of the tail before it, which overlaps the new ranges
        connection.execute(
            text("""
                DELETE FROM songvec.loaded_ranges
                WHERE table_name = :table AND range_start < :stop AND range_stop > :start
            """),
            bounds,
        )
        connection.execute(
            text("""
                INSERT INTO songvec.loaded_ranges
                    (table_name, range_start, range_stop, model, dimensions, n_songs, digest, song_ids, checksums)
                VALUES (:table, :start, :stop, :model, :dimensions, :n_songs, :digest, :song_ids, :checksums)
            """),
            bounds
            | {
                "model": spec.model,
                "dimensions": spec.dimensions,
                "n_songs": vectors.height,
                "digest": digest_rows(vectors),
                "song_ids": vectors["song_id"].to_numpy().astype("<i4").tobytes(),
                "checksums": vectors["checksum"].to_numpy().astype("<u8").tobytes(),
            },
        )


@dataclass(frozen=True)
class Records:
    """What is recorded about one table: its ledger, and values of `songvec.settings`.

    Attributes:
        name: `SERVING`, `STAGING` or `PREVIOUS`; a plain identifier, which SQL may hold as it is.
    """

    database: Database
    name: str = SERVING

    @property
    def is_serving(self) -> bool:
        """Whether searches read it."""
        return self.name == SERVING

    @property
    def ledger(self) -> Ledger:
        """What is loaded, by range."""
        return Ledger(self.database, self.name)

    def metadata_key(self, name: str) -> str:
        """The key of a value in `songvec.settings`."""
        return metadata_key(self.name, name)

    def read(self, connection: sa.Connection, name: str, kind: type[_Value]) -> _Value | None:
        """A recorded value; None if there is none, or none of this type: another version may have written it."""
        return schema.read_record(connection, self.metadata_key(name), kind)

    def write(self, connection: sa.Connection, name: str, value: Any) -> None:
        """Record a value within the connection's transaction."""
        schema.write_value(connection, self.metadata_key(name), value)

    def count_changes(self, connection: sa.Connection, n_rows: int) -> None:
        """Add to the rows changed since the index was built. Last in a transaction: others wait for its lock."""
        connection.execute(
            text("""
                INSERT INTO songvec.settings (key, value) VALUES (:key, to_jsonb(CAST(:n_rows AS bigint)))
                ON CONFLICT (key) DO UPDATE SET value = to_jsonb(:n_rows +
                    CASE WHEN jsonb_typeof(settings.value) = 'number' THEN settings.value::bigint ELSE 0 END)
            """),
            {"key": self.metadata_key(_CHANGES), "n_rows": n_rows},
        )

    def read_changes(self, connection: sa.Connection) -> int:
        """Rows written or deleted since the index was built."""
        return self.read(connection, _CHANGES, int) or 0

    def read_probes(self, connection: sa.Connection) -> int | None:
        """The lists that searches visit, as recorded with the index; None before there is one."""
        return self.read(connection, "probes", int)

    def read_candidates(self, connection: sa.Connection) -> int | None:
        """The rows that searches by bits put into exact order; None: the index has no bits."""
        return self.read(connection, "candidates", int)

    def rename_records(self, connection: sa.Connection, name: str) -> None:
        """Rename all that is recorded, with the table."""
        new = Records(self.database, name)
        connection.execute(
            text("UPDATE songvec.loaded_ranges SET table_name = :new WHERE table_name = :old"),
            {"old": self.name, "new": name},
        )
        connection.execute(
            text("UPDATE songvec.settings SET key = :new WHERE key = :old"),
            [{"old": self.metadata_key(each), "new": new.metadata_key(each)} for each in _METADATA],
        )

    def forget(self, connection: sa.Connection) -> None:
        """Delete what is recorded: there is no table of this name any more."""
        connection.execute(text("DELETE FROM songvec.loaded_ranges WHERE table_name = :table"), {"table": self.name})
        keys = [self.metadata_key(name) for name in _METADATA]
        connection.execute(text("DELETE FROM songvec.settings WHERE key = ANY (:keys)"), {"keys": keys})
