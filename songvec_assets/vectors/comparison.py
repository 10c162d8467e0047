"""The table built beside held against the serving one: what it lacks, its recall, and how its neighbours differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl
import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.cache.shards import ModelCache, load_embeddings_from_cache
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import StopSignal
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import load_songs_from_parquet, snapshot_path
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
        n_missing: songs that the serving table has and the other lacks, though they are neither gone nor set aside.
        missing: a few of them.
        n_sampled: songs whose neighbours were looked at.
        overlap: mean share of a song's ten nearest that both tables agree on; two models need not agree on much.
        recall_serving, recall_beside: in words, as measured last.
    """

    n_serving: int
    n_beside: int
    n_missing: int
    missing: list[int]
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


def compare_tables(database: Database, cache: ModelCache, songs_folder: Path, stop: StopSignal) -> Comparison:
    """Hold BESIDE against TABLE.

    Args:
        database: where both are, indexed.
        cache: the shards that BESIDE was loaded from.
        songs_folder: the snapshots: they tell the songs that are gone.
        stop: ends it between two ranges.
    """
    serving, beside = read_ledger(database, TABLE), read_ledger(database, BESIDE)
    missing: list[int] = []
    for song_range in serving:
        stop.check()
        missing.extend(_find_missing(database, cache, songs_folder, song_range))
    with database.get_connection() as connection:
        sample = _sample_shared_songs(connection)
        near = {table: find_neighbours(connection, table, sample) for table in (TABLE, BESIDE)}
        recalls = {table: read_recall(connection, table) for table in (TABLE, BESIDE)}
    told = {table: recall.describe() if recall else "recall not measured" for table, recall in recalls.items()}
    shared = [
        len(near[TABLE][song_id] & near[BESIDE][song_id]) / max(1, len(near[TABLE][song_id])) for song_id in sample
    ]
    return Comparison(
        n_serving=sum(entry.n_songs for entry in serving.values()),
        n_beside=sum(entry.n_songs for entry in beside.values()),
        n_missing=len(missing),
        missing=sorted(missing)[:5],
        n_sampled=len(sample),
        overlap=sum(shared) / len(shared) if shared else 0.0,
        recall_serving=told[TABLE],
        recall_beside=told[BESIDE],
    )


def _find_missing(database: Database, cache: ModelCache, songs_folder: Path, song_range: SongIdRange) -> list[int]:
    with database.get_connection() as connection:
        loaded = [read_loaded_rows(connection, song_range, table) for table in (TABLE, BESIDE)]
    serving, beside = (pl.Series(dtype=pl.Int32) if rows is None else rows["song_id"] for rows in loaded)
    refused = load_embeddings_from_cache(cache, song_range)[1].filter(pl.col("reason").is_not_null())["song_id"]
    expected = serving.filter(~serving.is_in(refused.implode()))
    path = snapshot_path(songs_folder, song_range)
    if path.exists():  # none says nothing: the songs may be there
        songs = load_songs_from_parquet(path, ["song_id", "set_aside"]).filter(pl.col("set_aside").is_null())
        expected = expected.filter(expected.is_in(songs["song_id"].implode()))
    return expected.filter(~expected.is_in(beside.implode())).to_list()


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
