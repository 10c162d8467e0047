"""The ledger of what is loaded into a table, by range: `songvec.loaded_ranges`.

A range's row names every song_id and checksum that the table holds for it, and is written in the transaction that
loads them: 12 bytes per song, whose row takes 8,008. When to add here: another question about what is loaded. Keep
out: what the table itself holds (`table`).
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import sqlalchemy as sa
import xxhash
from sqlalchemy import text

from songvec_assets.cache.manifest import digest_rows
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import has_tables
from songvec_assets.songs.ranges import SongIdRange, Tiling

if TYPE_CHECKING:
    from songvec_assets.vectors.table import TableSpec


@dataclass(frozen=True)
class LedgerEntry:
    """What is loaded of a range, in short; equal entries are equal rows.

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
    """The ledger of one table. Each method reads in the connection's transaction, or in one of its own.

    Attributes:
        database: where it is.
        table: whose.
    """

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
        """The songs loaded of a range; empty where it was never loaded."""
        rows = self.read_rows(song_range)
        return pl.Series("song_id", [], dtype=pl.Int32) if rows is None else rows["song_id"]

    def read_models(self) -> Counter[tuple[str, int]]:
        """Model and dimensions of the loaded ranges, with their songs."""
        models = Counter[tuple[str, int]]()
        for entry in self.read().values():
            models[entry.model, entry.dimensions] += entry.n_songs
        return models

    def find_ranges(self, tiling: Tiling) -> set[SongIdRange]:
        """The ranges of the loaded songs, as song_ids are divided now: a ledger may know the tail before."""
        ranges, tiles = set(), set(tiling)
        for song_range, entry in self.read().items():
            if song_range in tiles:
                ranges.add(song_range)
            elif entry.n_songs:
                starts = (self.read_song_ids(song_range) // tiling.width).unique() * tiling.width
                ranges.update(map(tiling.range_of, starts))
        return ranges

    def digest(self, spec: "TableSpec") -> str:
        """An identity of all that is loaded."""
        state = xxhash.xxh3_128(str(spec).encode())
        for song_range, entry in sorted(self.read().items()):
            state.update(f"{song_range.key} {entry.digest.hex()}\n".encode())
        return state.hexdigest()

    def write(
        self, connection: sa.Connection, song_range: SongIdRange, vectors: pl.DataFrame, spec: "TableSpec"
    ) -> None:
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

    def rename_to(self, connection: sa.Connection, table: str) -> None:
        """Let the rows follow a table that is renamed."""
        connection.execute(
            text("UPDATE songvec.loaded_ranges SET table_name = :new WHERE table_name = :table"),
            {"table": self.table, "new": table},
        )

    def clear(self, connection: sa.Connection) -> None:
        """Remove all rows: the table does not exist."""
        connection.execute(text("DELETE FROM songvec.loaded_ranges WHERE table_name = :table"), {"table": self.table})
