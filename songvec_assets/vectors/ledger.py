"""The ledger of what is loaded, in `songvec.loaded_ranges`, and the table's own song_ids to hold it against.

A range's row names every song_id and checksum that the table holds for it, and is written in the transaction that
loads them: 12 bytes a song beside 8,008.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import sqlalchemy as sa
import xxhash
from sqlalchemy import text

from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import has_tables
from songvec_assets.songs.counts import IdSums
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.table import TABLE, TableSpec, table_exists


@dataclass(frozen=True)
class LedgerEntry:
    """What is loaded of a range, in short; equal entries are equal loads."""

    n_songs: int
    digest: bytes

    @classmethod
    def of(cls, vectors: pl.DataFrame) -> "LedgerEntry":
        """The entry that a load of these rows (song_id, checksum; ordered by song_id) leaves."""
        state = xxhash.xxh3_128(vectors["song_id"].to_numpy().tobytes())
        state.update(vectors["checksum"].to_numpy().tobytes())
        return cls(vectors.height, state.digest())


def read_ledger(database: Database, table: str = TABLE) -> dict[SongIdRange, LedgerEntry]:
    """What is loaded into a table, by range."""
    with database.get_connection() as connection:
        return read_ledger_within(connection, table)


def read_ledger_within(connection: sa.Connection, table: str = TABLE) -> dict[SongIdRange, LedgerEntry]:
    """See `read_ledger`; within the connection's transaction."""
    if not has_tables(connection):
        return {}
    rows = connection.execute(
        text("SELECT range_start, range_stop, n_songs, digest FROM songvec.loaded_ranges WHERE table_name = :table"),
        {"table": table},
    )
    return {SongIdRange(start, stop): LedgerEntry(n_songs, bytes(digest)) for start, stop, n_songs, digest in rows}


def find_loaded_ranges(database: Database, tiling: Tiling) -> set[SongIdRange]:
    """The ranges of the serving table's songs, as song_ids are cut now: a ledger may know the tail before."""
    ranges, tiles = set(), set(tiling)
    for song_range, entry in read_ledger(database).items():
        if song_range in tiles:
            ranges.add(song_range)
        elif entry.n_songs:
            with database.get_connection() as connection:
                loaded = read_loaded_rows(connection, song_range)
            song_ids = () if loaded is None else (loaded["song_id"] // tiling.width).unique() * tiling.width
            ranges.update(tiling.range_of(song_id) for song_id in song_ids)
    return ranges


def digest_ledger(ledger: dict[SongIdRange, LedgerEntry], spec: TableSpec) -> str:
    """An identity of all that is loaded."""
    state = xxhash.xxh3_128(str(spec).encode())
    for song_range in sorted(ledger):
        state.update(f"{song_range.key} {ledger[song_range].digest.hex()}\n".encode())
    return state.hexdigest()


def read_loaded_rows(connection: sa.Connection, song_range: SongIdRange, table: str = TABLE) -> pl.DataFrame | None:
    """The rows (song_id Int32, checksum UInt64) loaded of a range; None for none."""
    if not has_tables(connection):
        return None
    row = connection.execute(
        text("""
            SELECT song_ids, checksums FROM songvec.loaded_ranges
            WHERE table_name = :table AND range_start = :start AND range_stop = :stop
        """),
        {"table": table, "start": song_range.start, "stop": song_range.stop},
    ).one_or_none()
    if row is None:
        return None
    song_ids, checksums = np.frombuffer(row.song_ids, dtype="<i4"), np.frombuffer(row.checksums, dtype="<u8")
    return pl.DataFrame({"song_id": song_ids, "checksum": checksums})


TableRows = IdSums
"""Which rows a table has of a range, by its primary key."""
_ROWS = IdSums.columns("song_id")


def read_table_rows(
    database: Database, tiling: Tiling, table: str = TABLE
) -> tuple[dict[SongIdRange, TableRows], TableRows]:
    """A table's rows by range, and those with a negative song_id; reads its primary key. No table has none."""
    with database.get_connection() as connection:
        if not table_exists(connection, table):
            return {}, TableRows()
        rows = connection.execute(
            text(f"""
                SELECT CASE WHEN song_id < 0 THEN -1 ELSE least(song_id, :stop) / :width END AS tile, {_ROWS}
                FROM {table} GROUP BY tile
            """),
            {"stop": tiling.stop, "width": tiling.width},
        )
        found = {tile: TableRows(*counts) for tile, *counts in rows}
    below = found.pop(-1, TableRows())
    return {tiling.range_of(tile * tiling.width): counts for tile, counts in found.items()}, below


def read_range_rows(connection: sa.Connection, song_range: SongIdRange, table: str = TABLE) -> TableRows:
    """A table's rows of one range."""
    n_rows, *sums = connection.execute(
        text(f"SELECT {_ROWS} FROM {table} WHERE song_id >= :start AND song_id < :stop"),
        {"start": song_range.start, "stop": song_range.stop},
    ).one()
    return TableRows(n_rows, *(each or 0 for each in sums))


def write_ledger(
    connection: sa.Connection, song_range: SongIdRange, vectors: pl.DataFrame, spec: TableSpec, table: str = TABLE
) -> None:
    """Record a range as loaded with these rows (song_id, checksum), within the transaction that loads them."""
    entry = LedgerEntry.of(vectors)
    # a raised stop leaves the old tail's row behind, which overlaps the new ranges
    connection.execute(
        text(
            "DELETE FROM songvec.loaded_ranges "
            "WHERE table_name = :table AND range_start < :stop AND range_stop > :start"
        ),
        {"table": table, "start": song_range.start, "stop": song_range.stop},
    )
    connection.execute(
        text("""
            INSERT INTO songvec.loaded_ranges
                (table_name, range_start, range_stop, model, dimensions, n_songs, digest, song_ids, checksums)
            VALUES (:table, :start, :stop, :model, :dimensions, :n_songs, :digest, :song_ids, :checksums)
        """),
        {
            "table": table,
            "start": song_range.start,
            "stop": song_range.stop,
            "model": spec.model,
            "dimensions": spec.dimensions,
            "n_songs": entry.n_songs,
            "digest": entry.digest,
            "song_ids": vectors["song_id"].to_numpy().astype("<i4").tobytes(),
            "checksums": vectors["checksum"].to_numpy().astype("<u8").tobytes(),
        },
    )
