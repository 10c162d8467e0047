"""Sample queries and their exact nearest neighbors, computed from the cache.

The ledger says which rows of the cache are loaded. One pass of matrix products over the mapped files answers all
queries at once; the server would read the whole table for each. Vectors are float32, so the precision that a `halfvec`
table loses is visible. Memory is bounded by a stored batch. When to add here: another kind of query. Keep
out: what searches find (`recall`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from songvec_assets.cache.cached_range import CachedRange
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.table import VectorTable

NEIGHBORS = 10
EPSILON = 1e-6
"""Cosine distances that differ by less are equal. A row counts as found if it is no farther than the exact tenth
nearest plus this, so that ties and duplicates do not count against an index. ann-benchmarks does the same
(`plotting/metrics.py`, distance of the k-th + epsilon, read 2026-11). Its 1e-3 would count half a cluster of similar
songs here, and hide what halfvec loses: a few millionths at 2,000 dimensions. Two float32 sums of 2,000 products in
different orders differ by about 1e-6."""

_KEPT = 50
_MOST_QUERIES = 100
_NOISE = 0.2


@dataclass(frozen=True)
class LoadedRows:
    """The rows of the cache that a table holds.

    Attributes:
        table, cache: where they are.
        ranges: number of rows of each loaded range.
    """

    table: VectorTable
    cache: ModelCache
    ranges: dict[SongIdRange, int]

    @classmethod
    def of(cls, table: VectorTable, cache: ModelCache) -> "LoadedRows":
        """By the ledger."""
        return cls(table, cache, {each: entry.n_songs for each, entry in sorted(table.ledger.read().items())})

    @property
    def n_rows(self) -> int:
        """Of all ranges, as the ledger counts them."""
        return sum(self.ranges.values())

    def read(self, song_range: SongIdRange) -> tuple[CachedRange, pl.DataFrame]:
        """A range and its loaded rows (song_id, row), even if newer ones are not loaded yet."""
        cached = self.cache.open(song_range)
        loaded = self.table.ledger.read_rows(song_range)
        stored = cached.all_rows.unique(["song_id", "checksum"], keep="last")
        if loaded is None:
            return cached, stored.select("song_id", "row").clear()
        return cached, stored.join(loaded, on=["song_id", "checksum"], how="semi").select("song_id", "row").sort("row")


def sample_queries(rows: LoadedRows) -> Float32Matrix:
    """Draw a tenth of the table's rows, ten to a hundred, and mix an equal number of synthetic queries from them.

    A row is its own nearest neighbor. A synthetic query lies between two rows, nearer to one, with noise of a fifth of
    its length: nothing in the table is like it.

    Returns:
        Unit vectors, (2 n, dimensions): n rows, then n synthetic ones.
    """
    draw = np.random.default_rng(0)  # the same table gives the same queries
    _, sampled = sample_rows(rows, min(_MOST_QUERIES, max(NEIGHBORS, rows.n_rows // 10)), draw)
    weights = draw.uniform(0.5, 0.9, (len(sampled), 1)).astype(np.float32)
    noise = _normalise(draw.standard_normal(sampled.shape, dtype=np.float32))
    mixed = weights * sampled + (1 - weights) * np.roll(sampled, 1, axis=0) + _NOISE * noise
    return np.concatenate([sampled, _normalise(mixed)])


def sample_rows(rows: LoadedRows, n_rows: int, draw: np.random.Generator) -> tuple[list[int], Float32Matrix]:
    """Draw n rows, or all if there are fewer: their song_ids, and unit vectors, (n, dimensions)."""
    counts = np.array(list(rows.ranges.values()), dtype=np.int64)
    song_ids: list[int] = []
    picked = [np.empty((0, rows.cache.dimensions), dtype=np.float32)]
    n_wanted = min(rows.n_rows, n_rows)
    shares = draw.multivariate_hypergeometric(counts, n_wanted, method="marginals") if len(counts) else counts
    for song_range, n_picked in zip(rows.ranges, shares.tolist(), strict=True):
        if n_picked:
            cached, loaded = rows.read(song_range)
            places = draw.choice(loaded.height, min(n_picked, loaded.height), replace=False)
            song_ids += loaded["song_id"].gather(places).to_list()
            picked.append(cached.embeddings_at(loaded["row"].gather(places).to_list()))
    return song_ids, _normalise(np.concatenate(picked))


@dataclass
class ExactNeighbors:
    """The nearest rows of each query, by exact arithmetic.

    Attributes:
        rows: that are searched.
        queries: unit vectors, (n, dimensions).
        song_ids: int32, (n, 50), nearest first; -1 if there are fewer rows.
        similarities: float32, (n, 50); -inf if there are fewer rows. A distance is 1 less it.
        n_found: rows that the cache has.
    """

    rows: LoadedRows
    queries: Float32Matrix
    song_ids: NDArray[np.int32]
    similarities: Float32Matrix
    n_found: int = 0
    _looked_up: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def n_wanted(self) -> int:
        """Neighbors of each query: ten, or all rows of a table that has fewer."""
        return min(NEIGHBORS, self.n_found)

    def count_hits(self, found: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Per query, how many of the rows found are as near as the exact tenth nearest, within EPSILON; (n,).

        Distances are exact, and not the server's, which are rounded for a `halfvec` table.
        """
        floors = self.similarities[:, max(0, self.n_wanted - 1)] - EPSILON
        hits, unsure = np.zeros(len(found), dtype=np.int64), []
        for query, ids in enumerate(found):
            near = set(self.song_ids[query][self.similarities[query] >= floors[query]].tolist())
            hits[query] = len(near.intersection(ids))
            if self.similarities[query, -1] >= floors[query]:  # more rows tie than were kept
                unsure += [(query, song_id) for song_id in set(ids) - near]
        self._look_up([pair for pair in unsure if pair not in self._looked_up])
        for query, song_id in unsure:
            hits[query] += self._looked_up[query, song_id] >= floors[query]
        return hits

    def _look_up(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Compute the similarities of pairs (query, song_id), range by range."""
        self._looked_up.update(dict.fromkeys(pairs, -np.inf))
        for song_range in self.rows.ranges:
            here = [(query, song_id) for query, song_id in pairs if song_id in song_range]
            if not here:
                continue
            cached, loaded = self.rows.read(song_range)
            wanted = loaded.filter(pl.col("song_id").is_in({song_id for _, song_id in here}))
            vectors = _normalise(cached.embeddings_at(wanted["row"].to_list()))
            places = {song_id: place for place, song_id in enumerate(wanted["song_id"].to_list())}
            for query, song_id in here:
                if song_id in places:
                    self._looked_up[query, song_id] = float(vectors[places[song_id]] @ self.queries[query])


def find_exact_neighbors(rows: LoadedRows, queries: Float32Matrix, run: RunContext = SILENT) -> ExactNeighbors:
    """Compare every loaded row with every query, in one pass over the cache.

    Args:
        rows: the table's.
        queries: unit vectors, (n, dimensions).
        run: notified of the rows; a stop ends it between two batches.
    """
    shape = (len(queries), _KEPT)
    best = ExactNeighbors(rows, queries, np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32))
    # one core is left to the server's searches
    with threadpool_limits(max(1, (os.cpu_count() or 2) - 1), "blas"):
        for song_range in rows.ranges:
            cached, loaded = rows.read(song_range)
            for batch in cached.iter_vectors(loaded["row"]):
                run.check_stop()
                lengths = np.sqrt(np.einsum("ij,ij->i", batch.embeddings, batch.embeddings))
                _keep_best(best, batch.song_ids, (queries @ batch.embeddings.T) / lengths)
                best.n_found += len(batch.song_ids)
                run.report(Progress("find exact neighbors", best.n_found, rows.n_rows, unit="rows"))
    order = np.argsort(-best.similarities, axis=1, kind="stable")
    best.song_ids = np.take_along_axis(best.song_ids, order, axis=1)
    best.similarities = np.take_along_axis(best.similarities, order, axis=1)
    return best


def _keep_best(best: ExactNeighbors, song_ids: NDArray[np.int32], similarities: Float32Matrix) -> None:
    """Replace the worst of those kept by the better ones of a batch, (n queries, n rows)."""
    for query in np.flatnonzero((similarities > best.similarities.min(axis=1, keepdims=True)).any(axis=1)):
        values = np.concatenate([best.similarities[query], similarities[query]])
        ids = np.concatenate([best.song_ids[query], song_ids])
        top = np.argpartition(-values, _KEPT - 1)[:_KEPT]
        best.similarities[query], best.song_ids[query] = values[top], ids[top]


def _normalise(vectors: Float32Matrix) -> Float32Matrix:
    unit: Float32Matrix = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
