"""How well searches answer labelled queries: by words, by vectors and by both, compared with other rankings.

When to add here: another figure or sentence of the result. Keep out: single measures (`measures`), and where labelled
queries come from (`labels`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import SearchError
from songvec_assets.search import measures
from songvec_assets.search.labels import ALL, LabelledQuery
from songvec_assets.search.measures import N_FIRST, Interval
from songvec_assets.search.nearest import search_songs
from songvec_assets.search.query import Mode, Query
from songvec_assets.songs.source import SongsSource

Rankings = Mapping[str, Sequence[Sequence[int]]]
"""The song_ids that each mode found for each query, best first."""


@dataclass(frozen=True)
class QueryScore:
    """How one query was answered.

    Attributes:
        query, slice, mode: which query, and how it was searched for.
        song_ids: found, best first.
        recall, reciprocal_rank, ndcg: see `measures`.
    """

    query: str
    slice: str
    mode: str
    song_ids: tuple[int, ...]
    recall: float
    reciprocal_rank: float
    ndcg: float


@dataclass(frozen=True)
class Score:
    """How a mode answered the queries of a slice; slice `all` has all queries."""

    slice: str
    mode: str
    n_queries: int
    recall: Interval
    mrr: Interval
    ndcg: Interval


@dataclass(frozen=True)
class Verdict:
    """Hybrid searches of a slice, compared with the better of searches by text and by vector.

    Attributes:
        slice: which queries.
        other: the better of the two modes, by nDCG@10.
        difference: of nDCG@10, hybrid - other, with the interval of the paired bootstrap.
    """

    slice: str
    other: str
    difference: Interval

    @property
    def is_worse(self) -> bool:
        """Whether hybrid is significantly worse."""
        return self.difference.high < 0

    def describe(self) -> str:
        """One sentence."""
        mean, low, high = self.difference.mean, self.difference.low, self.difference.high
        found = (
            f"is significantly better than {self.other}" if low > 0
            else f"is significantly worse than {self.other}" if self.is_worse
            else f"is as good as {self.other}" if low == high == 0
            else f"does not differ significantly from {self.other}"
        )  # fmt: skip
        return f"{self.slice}: hybrid {found} (nDCG@10 {mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})."


@dataclass(frozen=True)
class Evaluation:
    """How well searches answer labelled queries.

    Attributes:
        scores: by slice and mode; the slice of all queries comes first.
        verdicts: one per slice; none if hybrid could not be measured.
        answers: of each query by each mode.
        notes: what was left out, and why.
    """

    scores: tuple[Score, ...]
    verdicts: tuple[Verdict, ...]
    answers: tuple[QueryScore, ...]
    notes: tuple[str, ...]


def find_songs(
    source: SongsSource,
    queries: Sequence[LabelledQuery],
    vectors: Float32Matrix,
    model: str,
    modes: Sequence[Mode] = ("text", "vector", "hybrid"),
) -> tuple[dict[str, list[list[int]]], list[str]]:
    """The song_ids that each mode finds for each query, and what could not be searched for.

    Args:
        vectors: of the queries, (n queries, dimensions).
        model: that made them.
    """
    found: dict[str, list[list[int]]] = {}
    refused: dict[str, str] = {}
    for mode in modes:
        asked = [
            Query(
                None if mode == "text" else vector,
                None if mode == "vector" else query.words,
                limit=N_FIRST,
                model=None if mode == "text" else model,
            )
            for query, vector in zip(queries, vectors, strict=True)
        ]
        try:
            found[mode] = [[hit.song_id for hit in search_songs(source.database, source, each)] for each in asked]
        except SearchError as error:
            if error.code != "search.no-index":
                raise
            refused[mode] = str(error)
    return found, [f"left out: {', '.join(refused)}: {next(iter(refused.values()))}"] if refused else []


def evaluate(queries: Sequence[LabelledQuery], found: Rankings, notes: Sequence[str] = ()) -> Evaluation:
    """Measure what was found. Pure.

    Args:
        queries: one at least.
        found: by mode; hybrid is compared with the better of text and vector.
        notes: what was left out.
    """
    answers = {
        mode: [_measure(query, mode, song_ids) for query, song_ids in zip(queries, lists, strict=True)]
        for mode, lists in found.items()
    }
    names = [ALL, *dict.fromkeys(query.slice for query in queries if query.slice != ALL)]
    scores: list[Score] = []
    verdicts = []
    for name in names:
        places = [place for place, query in enumerate(queries) if name in (ALL, query.slice)]
        of_slice = {mode: _score(name, mode, [each[place] for place in places]) for mode, each in answers.items()}
        scores += of_slice.values()
        if {"text", "vector", "hybrid"} <= of_slice.keys():
            other = max("vector", "text", key=lambda mode: of_slice[mode].ndcg.mean)
            pairs = [(answers["hybrid"][place].ndcg, answers[other][place].ndcg) for place in places]
            verdicts.append(Verdict(name, other, compare(*zip(*pairs, strict=True))))
    return Evaluation(tuple(scores), tuple(verdicts), (*chain(*answers.values()),), tuple(notes))


def compare(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean difference of a measure of the same queries, with the interval of the paired bootstrap."""
    [interval] = measures.estimate_means(np.subtract(values, others)[:, None])
    return interval


def measure_ndcg(query: LabelledQuery, song_ids: Sequence[int]) -> float:
    """nDCG@10 of what was found for a query."""
    return measures.measure_ndcg(_grade(query, song_ids), [*query.grades.values()])


def _grade(query: LabelledQuery, song_ids: Sequence[int]) -> list[int]:
    return [query.grades.get(song_id, 0) for song_id in song_ids]


def _measure(query: LabelledQuery, mode: str, song_ids: Sequence[int]) -> QueryScore:
    grades, wanted = _grade(query, song_ids), [*query.grades.values()]
    recall, rank = measures.measure_recall(grades, wanted), measures.measure_reciprocal_rank(grades)
    ndcg = measures.measure_ndcg(grades, wanted)
    return QueryScore(query.words, query.slice, mode, tuple(song_ids), recall, rank, ndcg)


def _score(name: str, mode: str, answers: Sequence[QueryScore]) -> Score:
    values = np.array([(each.recall, each.reciprocal_rank, each.ndcg) for each in answers])
    return Score(name, mode, len(answers), *measures.estimate_means(values))
