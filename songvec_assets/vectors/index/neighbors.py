"""Sample queries and their exact nearest neighbors, computed from the cache.

The ledger says which rows of the cache are loaded. One pass of matrix products over the mapped files answers all
queries at once; the server would read the whole table for each. Vectors are float32, so the precision that a `halfvec`
table loses is visible. Memory is bounded by a stored batch. Of a large table a sample of the rows is read, see
`ExactNeighbors`. When to add here: another kind of query. Keep out: what searches find (`recall_searches`).
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from songvec_assets.cache.cached_range import CachedRange
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cache.parts import PIECE_ROWS, CachedRows
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.threads import DaemonThreads
from songvec_assets.vectors.ledger import LedgerEntry
from songvec_assets.vectors.table import VectorTable

NEIGHBORS = 10
EPSILON = 1e-6
"""Cosine distances that differ by less are equal. A row counts as found if it is no farther than the exact tenth
nearest plus this, so that ties and duplicates do not count against an index. ann-benchmarks does the same
(`plotting/metrics.py`, distance of the k-th + epsilon, read 2026-11). Its 1e-3 would count half a cluster of similar
songs here, and hide what halfvec loses: a few millionths at 2,000 dimensions. Two float32 sums of 2,000 products in
different orders differ by about 1e-6."""

Distances = Mapping[int, float]
"""What a search returned: song_ids and cosine distances, nearest first."""

_KEPT = 50
"""Rows kept of each query, more than NEIGHBORS: rows that tie with the tenth count as found, too."""
_MOST_ROWS, _LEAST_SHARE = 1_000_000, 0.1
_MOST_QUERIES, _MOST_QUERIES_OF_SAMPLE = 200, 1000
_SAMPLED_RANGES = 64
"""A range takes 15 ms to open: of some hundred, that would leave no time to measure recall in."""
_NOISE = 0.2


@dataclass(frozen=True)
class LoadedRows:
    """The rows of the cache that a table holds.

    Attributes:
        ranges: what is loaded, by range, in order.
    """

    table: VectorTable
    cache: ModelCache
    ranges: dict[SongIdRange, LedgerEntry]

    @classmethod
    def of(cls, table: VectorTable, cache: ModelCache) -> "LoadedRows":
        """By the ledger."""
        return cls(table, cache, dict(sorted(table.ledger.read().items())))

    @property
    def n_rows(self) -> int:
        """Of all ranges, as the ledger counts them."""
        return sum(entry.n_songs for entry in self.ranges.values())

    @property
    def share(self) -> float:
        """Of the rows that are compared: all up to a million, then a million, or a tenth if that is more."""
        return max(min(1.0, _MOST_ROWS / max(1, self.n_rows)), _LEAST_SHARE)

    def read(self, song_range: SongIdRange) -> tuple[CachedRange, pl.DataFrame]:
        """A range and its loaded rows (song_id, row), even if newer ones are not loaded yet."""
        cached = self.cache.open(song_range)
        loaded = self.table.ledger.read_rows(song_range)
        stored = cached.all_rows.unique(["song_id", "checksum"], keep="last")
        if loaded is None:
            return cached, stored.select("song_id", "row").clear()
        return cached, stored.join(loaded, on=["song_id", "checksum"], how="semi").select("song_id", "row").sort("row")


def sample_queries(rows: LoadedRows) -> Float32Matrix:
    """Draw rows of the table, and mix an equal number of synthetic queries from them.

    There are a hundred of each kind; more if only a sample of the rows is compared, as each query has fewer trials
    then. A row is its own nearest neighbor. A synthetic query lies between two rows, nearer to one, with noise of a
    fifth of its length: nothing in the table is like it.

    Returns:
        Unit vectors, (2 n, dimensions), in random order: a row, a synthetic one, a row, …
    """
    draw = np.random.default_rng(0)  # the same table gives the same queries
    n_pairs = min(round(_MOST_QUERIES / rows.share), _MOST_QUERIES_OF_SAMPLE) // 2
    _, sampled = sample_rows(rows, n_pairs, draw)
    sampled = draw.permutation(sampled)
    weights = draw.uniform(0.5, 0.9, (len(sampled), 1)).astype(np.float32)
    noise = _normalise(draw.standard_normal(sampled.shape, dtype=np.float32))
    mixed = weights * sampled + (1 - weights) * np.roll(sampled, 1, axis=0) + _NOISE * noise
    return np.stack([sampled, _normalise(mixed)], axis=1).reshape(-1, rows.cache.dimensions)


def sample_rows(rows: LoadedRows, n_rows: int, draw: np.random.Generator) -> tuple[list[int], Float32Matrix]:
    """Draw n rows of up to 64 ranges, or all if there are fewer: their song_ids, and unit vectors, (n, dimensions)."""
    held = [song_range for song_range, entry in rows.ranges.items() if entry.n_songs]
    if len(held) > _SAMPLED_RANGES:
        held = [held[place] for place in np.sort(draw.choice(len(held), _SAMPLED_RANGES, replace=False))]
    counts = np.array([rows.ranges[each].n_songs for each in held], dtype=np.int64)
    song_ids: list[int] = []
    picked = [np.empty((0, rows.cache.dimensions), dtype=np.float32)]
    n_wanted = min(int(counts.sum()), n_rows)
    shares = draw.multivariate_hypergeometric(counts, n_wanted, method="marginals") if held else counts
    for song_range, n_picked in zip(held, shares.tolist(), strict=True):
        if n_picked:
            cached, loaded = rows.read(song_range)
            places = draw.choice(loaded.height, min(n_picked, loaded.height), replace=False)
            song_ids += loaded["song_id"].gather(places).to_list()
            picked.append(cached.embeddings_at(loaded["row"].gather(places).to_list()))
    return song_ids, _normalise(np.concatenate(picked))


@dataclass
class ExactNeighbors:
    """The nearest rows of each query among those that were read, by exact arithmetic.

    If only a sample of the rows was read, the true ten nearest of the table are known in part. Each of them is in the
    sample with the same probability, whether the index finds it or not: those that are in it are unbiased trials. A row
    of the sample is one of the ten if fewer than ten are nearer, and these are counted among all that searches found,
    and the sample's other rows, each of which represents 1/share rows. To search the sample alone would measure
    something else: its ten nearest are far from the query, and in other lists than the table's ten nearest.

    Attributes:
        queries: unit vectors, (n, dimensions).
        n_rows: of the table, as the ledger counts them.
        song_ids: int32, (n, 50), nearest first; -1 if there are fewer rows.
        similarities: float32, (n, 50); -inf if there are fewer rows. A distance is 1 less it.
        n_read: rows compared.
        n_missing: rows that the cache lacks.
    """

    queries: Float32Matrix
    n_rows: int
    song_ids: NDArray[np.int32]
    similarities: Float32Matrix
    n_read: int = 0
    n_missing: int = 0

    @property
    def share(self) -> float:
        """Of the rows that were read."""
        return self.n_read / max(1, self.n_rows - self.n_missing)

    @cached_property
    def literals(self) -> list[str]:
        """The queries as pgvector reads them."""
        return [json.dumps(vector.tolist()) for vector in self.queries]

    def judge(self, query: int, found: Distances, others: Distances) -> tuple[int, int]:
        """How many of a query's true ten nearest a search found, and of how many that were read.

        Distances are exact where a row was kept; else they are the server's, which are rounded for a `halfvec` table.

        Args:
            query: its number.
            found: song_ids and distances that the search returned.
            others: what other searches for the same query returned. If only a sample was read, and no wider search was
                made, rows beyond the true ten count too, and recall is rather too low.
        """
        kept = dict(zip(self.song_ids[query].tolist(), self.similarities[query].tolist(), strict=True))
        # if all rows were read, one that was not kept is no nearer than the last one that was
        ceiling = self.similarities[query, -1].item() if self.share >= 1 else 1.0
        nearness = {song_id: min(1 - distance, ceiling) for song_id, distance in {**others, **found}.items()} | kept
        # among equals, those that were found count
        order = sorted(nearness, key=lambda song_id: -nearness[song_id] - EPSILON * (song_id in found))
        n_wanted, n_nearer, n_hits, n_trials = min(NEIGHBORS, self.n_rows - self.n_missing), 0.0, 0, 0
        for song_id in order:
            if n_nearer >= n_wanted:
                break
            is_trial = self.share >= 1 or song_id in kept
            n_trials += is_trial
            n_hits += is_trial and song_id in found
            n_nearer += 1 if song_id in found or song_id in others else 1 / self.share
        return n_hits, n_trials


def find_exact_neighbors(
    rows: LoadedRows, queries: Float32Matrix, run: RunContext = SILENT, ends_at: float = math.inf
) -> ExactNeighbors:
    """Compare the loaded rows, or a sample, with every query, in one pass over the cache in random order.

    Args:
        rows: the table's.
        queries: unit vectors, (n, dimensions).
        run: notified of the rows; a stop ends it between two batches.
        ends_at: `time.monotonic()` after which no further batch is read; one is in any case.
    """
    shape = (len(queries), _KEPT)
    best = ExactNeighbors(queries, rows.n_rows, np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32))
    # one core is left to the server's searches
    with threadpool_limits(max(1, (os.cpu_count() or 2) - 1), "blas"):
        for batch in _read_pieces(rows, best):
            run.check_stop()
            lengths = np.sqrt(np.einsum("ij,ij->i", batch.embeddings, batch.embeddings))
            _keep_best(best, batch.song_ids, (queries @ batch.embeddings.T) / lengths)
            best.n_read += len(batch.song_ids)
            run.report(Progress("find exact neighbors", best.n_read, round(rows.n_rows * rows.share), unit="rows"))
            if time.monotonic() >= ends_at:
                break
    order = np.argsort(-best.similarities, axis=1, kind="stable")
    best.song_ids = np.take_along_axis(best.song_ids, order, axis=1)
    best.similarities = np.take_along_axis(best.similarities, order, axis=1)
    return best


def _read_pieces(rows: LoadedRows, best: ExactNeighbors) -> Iterator[CachedRows]:
    """The loaded rows, or a sample of them, piece by piece in random order; counts the missing ones."""
    draw, ranges = np.random.default_rng(0), list(rows.ranges.items())
    for place in draw.permutation(len(ranges)).tolist():
        song_range, entry = ranges[place]
        cached, loaded = rows.read(song_range)
        best.n_missing += entry.n_songs - loaded.height
        pieces = loaded["row"].to_numpy() // PIECE_ROWS
        numbers = draw.permutation(np.unique(pieces))
        for number in numbers[: int(rows.share * len(numbers) + draw.random())]:
            yield from cached.iter_vectors(loaded["row"].filter(pieces == number))


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


@dataclass(frozen=True)
class Prepared:
    """Queries and their exact neighbors, which do not depend on the index.

    Attributes:
        rows: that were compared: if others are loaded by now, the neighbors are found again.
        exact: what was found.
    """

    rows: LoadedRows
    exact: ExactNeighbors


def prepare(table: VectorTable, cache: ModelCache, run: RunContext) -> "Future[Prepared]":
    """Begin to find the exact neighbors in another thread, while the index of a small table is built."""

    def find() -> Prepared:
        rows = LoadedRows.of(table, cache)
        # silent: the build's progress is shown
        exact = find_exact_neighbors(rows, sample_queries(rows), RunContext(stop=run.stop))
        exact.literals  # noqa: B018 - computed now, 0.2 s, while the server works
        return Prepared(rows, exact)

    thread = DaemonThreads(1, "songvec-neighbors")
    prepared = thread.submit(find)
    thread.shutdown(wait=False)
    return prepared
