"""How well the demo's model finds songs by what they are about, compared with the hashed words of `offline-v1`.

The queries are those of the sample catalogue's slices `themes` and `languages`; see `songvec_assets.samples`.

    python -m benchmarks.demo_quality            # the table
    python -m benchmarks.demo_quality --queries  # and each query with its first three songs

When to add here: another embedder of the package. Keep out: models that the package does not offer.
"""

import argparse
import asyncio
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from songvec_assets.embedding.demo import DemoEmbedder
from songvec_assets.embedding.offline import LocalEmbedder, OfflineEmbedder
from songvec_assets.samples import read_sample_queries, read_sample_songs
from songvec_assets.settings import DEFAULT_DIMENSIONS, DEMO_MODEL, OFFLINE_MODEL
from songvec_assets.songs.text import TextSpec, render_texts

N_FIRST = 10
N_RESAMPLES = 5000


@dataclass(frozen=True)
class Result:
    """What an embedder found.

    Attributes:
        name: of its model.
        order: songs of each query by similarity, nearest first, (n queries, n songs).
        ndcg: nDCG@10 of each query, (n queries,).
    """

    name: str
    order: NDArray[np.int64]
    ndcg: NDArray[np.float64]


@functools.cache
def read_queries() -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Queries, their slices, and the grade of each sample song, (n queries, n songs)."""
    rows = read_sample_queries()
    rows = rows.filter(rows["slice"].is_in(["themes", "languages"]))
    queries = rows.select("slice", "query").unique(maintain_order=True)
    places = {name: place for place, name in enumerate(read_sample_songs()["name"])}
    grades = np.zeros((queries.height, len(places)), dtype=np.int64)
    numbers = {query: number for number, query in enumerate(queries["query"])}
    for query, song, grade in rows.select("query", "song", "grade").iter_rows():
        grades[numbers[query], places[song]] = grade
    return queries["query"].to_list(), queries["slice"].to_list(), grades


def measure(name: str, embedder: LocalEmbedder) -> Result:
    """Search the sample songs, embedded as the pipeline does, with every query."""
    queries, _, grades = read_queries()
    texts = render_texts(read_sample_songs().with_row_index("song_id"), TextSpec())["text"].to_list()
    batch = asyncio.run(embedder.generate_embeddings_batch([*texts, *queries]))
    songs, asked = np.split(batch.embeddings, [len(texts)])
    order = np.argsort(-(asked @ songs.T), axis=1, kind="stable")
    return Result(name, order, score_orders(order, grades))


def score_orders(order: NDArray[np.int64], grades: NDArray[np.int64]) -> NDArray[np.float64]:
    """nDCG@10 per query: gains of 1 and 3 for grades 1 and 2, discounted by log2(1 + rank)."""
    discounts = 1 / np.log2(np.arange(2, N_FIRST + 2))
    found = 2 ** np.take_along_axis(grades, order, axis=1)[:, :N_FIRST] - 1
    best = 2 ** -np.sort(-grades, axis=1)[:, :N_FIRST] - 1
    scores: NDArray[np.float64] = (found @ discounts) / (best @ discounts)
    return scores


def resample(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over queries that are drawn with replacement; the same draws each time, so that results can be paired."""
    draws = np.random.default_rng(0).integers(0, len(values), (N_RESAMPLES, len(values)))
    means: NDArray[np.float64] = values[draws].mean(axis=1)
    return means


def render(results: list[Result]) -> str:
    """The results as a Markdown table; the ratio is to the first."""
    english = np.array(read_queries()[1]) == "themes"
    lines = [
        f"| model | nDCG@{N_FIRST}, {len(english)} queries | {english.sum()} in English | "
        f"{(~english).sum()} in other languages | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    first = results[0].ndcg
    for each in results:
        means = resample(each.ndcg)
        parts = f"{each.ndcg[english].mean():.3f} | {each.ndcg[~english].mean():.3f}"
        ratio = f"{each.ndcg.mean() / first.mean():.1f} ({_interval(means / resample(first), 1)})"
        lines.append(f"| {each.name} | {each.ndcg.mean():.3f} ({_interval(means, 3)}) | {parts} | {ratio} |")
    return "\n".join(lines)


def _interval(values: NDArray[np.float64], digits: int) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    return f"{low:.{digits}f}–{high:.{digits}f}"


def render_queries(result: Result) -> str:
    """Each query with its score and its first three songs, with their grades; the best first."""
    queries, _, grades = read_queries()
    names = read_sample_songs()["name"].to_list()
    lines = []
    for number in np.argsort(-result.ndcg, kind="stable"):
        songs = "; ".join(f"{names[place]} ({grades[number, place]})" for place in result.order[number, :3])
        lines.append(f"{result.ndcg[number]:.2f}  {queries[number]}: {songs}")
    return "\n".join(lines)


def main() -> None:
    """Measure both embedders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", action="store_true", help="also print each query with its first three songs")
    asked = parser.parse_args()
    results = [measure(OFFLINE_MODEL, OfflineEmbedder(DEFAULT_DIMENSIONS)), measure(DEMO_MODEL, DemoEmbedder())]
    print(render(results))
    if asked.queries:
        print(render_queries(results[-1]))


if __name__ == "__main__":
    main()
