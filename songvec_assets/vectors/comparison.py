"""The table built beside held against the serving one: what it lacks, its recall, and how its neighbours differ."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl
import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.cache.shards import ModelCache
from songvec_assets.errors import DamagedShardError, StoreError, TableMismatchError
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import StopSignal
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.snapshots import load_songs_from_parquet, snapshot_path, snapshot_ranges
from songvec_assets.vectors.backlog import check_whole
from songvec_assets.vectors.catalogue import search_lists
from songvec_assets.vectors.ledger import read_ledger, read_loaded_rows
from songvec_assets.vectors.recall import read_recall
from songvec_assets.vectors.table import BESIDE, TABLE

_SAMPLE_SONGS, _NEIGHBOURS = 50, 10


@dataclass(frozen=True)
class Comparison:
    """Two tables.

    Attributes:
        n_serving, n_beside: rows.
        n_sampled: songs whose neighbours were looked at.
        overlap: mean share of a song's ten nearest that both tables agree on; two models need not agree on much.
        recall_serving, recall_beside: in words, as measured last.
    """

    n_serving: int
    n_beside: int
    n_sampled: int
    overlap: float
    recall_serving: str
    recall_beside: str

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.n_beside:,} rows, {self.n_serving:,} before; {self.recall_beside}, before: {self.recall_serving}; "
            f"{self.n_sampled:,} songs share {self.overlap:.0%} of their ten nearest with the table before"
        )


def compare_tables(database: Database) -> Comparison:
    """Compare BESIDE with TABLE. Both are indexed."""
    ledgers = {table: read_ledger(database, table) for table in (TABLE, BESIDE)}
    with database.get_connection() as connection:
        sample = _sample_shared_songs(connection)
        near = {table: find_neighbours(connection, table, sample) for table in (TABLE, BESIDE)}
        recalls = {table: read_recall(connection, table) for table in (TABLE, BESIDE)}
    told = {table: recall.describe() if recall else "recall not measured" for table, recall in recalls.items()}
    shared = [
        len(near[TABLE][song_id] & near[BESIDE][song_id]) / max(1, len(near[TABLE][song_id])) for song_id in sample
    ]
    return Comparison(
        n_serving=sum(entry.n_songs for entry in ledgers[TABLE].values()),
        n_beside=sum(entry.n_songs for entry in ledgers[BESIDE].values()),
        n_sampled=len(sample),
        overlap=sum(shared) / len(shared) if shared else 0.0,
        recall_serving=told[TABLE],
        recall_beside=told[BESIDE],
    )


@dataclass(frozen=True)
class MissingSongs:
    """Looks for songs that the serving table has, and the one that is to replace it would not.

    Songs are compared by their ids, whatever ranges they were cut into: since they were loaded the stop may have been
    raised. Not missing is a song that was deleted from the source or rejected by the export, so that it is not in the
    snapshots, or that was rejected by the provider. Where a range has no snapshot, nothing is known of its songs.

    Attributes:
        database: where the tables are.
        cache: the shards that the new table is loaded from.
        tiling: how song_ids are cut.
        songs_folder: the snapshots.
        stop: ends it between two ranges.
    """

    database: Database
    cache: ModelCache
    tiling: Tiling
    songs_folder: Path
    stop: StopSignal

    def check_cache(self) -> None:
        """Ask it of the cache, before anything is built. A damaged shard counts as whole: its load says what is wrong.

        Raises:
            TableMismatchError: there are such songs.
        """
        tiles = set(self.tiling)
        self._check("the cache", [each for each in self.cache.ranges() if each in tiles], self._read_loadable)

    def check_table(self) -> None:
        """Ask it of BESIDE.

        Raises:
            TableMismatchError: there are such songs.
        """
        self._check(BESIDE, list(read_ledger(self.database, BESIDE)), partial(self._read_loaded, BESIDE))

    def _check(self, name: str, given: list[SongIdRange], read: Callable[[SongIdRange], set[int] | None]) -> None:
        missing: list[int] = []
        cached, exported = self.cache.ranges(), snapshot_ranges(self.songs_folder)
        for song_range in sorted(read_ledger(self.database)):
            self.stop.check()
            songs = self._read_loaded(TABLE, song_range)
            for each in _overlapping(song_range, given):
                there = read(each)
                songs = {song_id for song_id in songs if song_id not in each} if there is None else songs - there
            if not songs:
                continue
            for each in _overlapping(song_range, cached):
                songs -= self._read_rejected(each)
            known = _overlapping(song_range, exported)
            kept = set[int]().union(*map(self._read_exported, known))
            missing += [song_id for song_id in songs if song_id in kept or not any(song_id in each for each in known)]
        if missing:
            missing.sort()
            keys = [each.key for each in sorted({self.tiling.range_of(song_id) for song_id in missing})]
            raise TableMismatchError(
                f"{name} lacks {len(missing):,} songs that {TABLE} has and that were not deleted from the source "
                f"(song_id {', '.join(map(str, missing[:5]))}, …; range {', '.join(keys[:5])}, …): {TABLE} was not "
                f"replaced. Export and fill these ranges for {self.cache.model}, then start the same command again; "
                "`songvec swap` does all of it, and names the ranges that fail"
            )

    def _read_loaded(self, table: str, song_range: SongIdRange) -> set[int]:
        with self.database.get_connection() as connection:
            loaded = read_loaded_rows(connection, song_range, table)
        return set() if loaded is None else set(loaded["song_id"])

    def _read_loadable(self, song_range: SongIdRange) -> set[int] | None:
        try:
            shard = self.cache.open(song_range)
            check_whole(shard, None)
        except (StoreError, DamagedShardError):
            return None
        return set(shard.rows["song_id"])

    def _read_rejected(self, song_range: SongIdRange) -> set[int]:
        return {each.song_id for each in self.cache.read_manifest(song_range).rejected}

    def _read_exported(self, song_range: SongIdRange) -> set[int]:
        path = snapshot_path(self.songs_folder, song_range)
        songs = load_songs_from_parquet(path, ["song_id", "set_aside"])
        return set(songs.filter(pl.col("set_aside").is_null())["song_id"])


def _overlapping(song_range: SongIdRange, ranges: Iterable[SongIdRange]) -> list[SongIdRange]:
    return [each for each in ranges if each.start < song_range.stop and song_range.start < each.stop]


def _sample_shared_songs(connection: sa.Connection) -> list[int]:
    """Songs of both tables, spread over all song_ids."""
    rows = connection.scalars(
        text(f"""
            SELECT song_id FROM (
                SELECT song_id, row_number() OVER (ORDER BY song_id) AS place, count(*) OVER () AS n_rows
                FROM {TABLE} JOIN {BESIDE} USING (song_id)
            ) AS shared
            WHERE place % greatest(1, n_rows / :n_songs) = 0 LIMIT :n_songs
        """),
        {"n_songs": _SAMPLE_SONGS},
    )
    return list(rows)


def find_neighbours(connection: sa.Connection, table: str, song_ids: list[int]) -> dict[int, set[int]]:
    """The ten nearest others of some songs, as a table's searches find them."""
    statement = text(f"""
        SELECT song_id FROM {table} WHERE song_id <> :song_id
        ORDER BY embedding <=> (SELECT embedding FROM {table} WHERE song_id = :song_id) LIMIT {_NEIGHBOURS}
    """)

    def search(song_id: int) -> Sequence[int]:
        return connection.scalars(statement, {"song_id": song_id}).all()

    return {
        song_id: set(search_lists(connection, partial(search, song_id), _NEIGHBOURS, table=table))
        for song_id in song_ids
    }
