"""Made-up vectors that lie as published models' vectors do, and a few real ones, for benchmarks of searches.

Made-up ones have a common mean, with 40 % of their squared length. Of the rest, a part is shared by the rows of one of
√n clusters, and another by those of one of n/50 smaller ones; the sizes of both follow Pareto distributions. The
variance of the k-th of 512 directions falls as a power of k; the directions are turned at random into all values, to
which noise is added. `share_by_bits` shows how near that is: for 1 M × 1536 real vectors, 0.67 to 0.69 are published.
Real ones are those of the demo's model, as many as the sample songs give.
"""

import math
from collections.abc import Iterator
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from songvec_assets.embedding.demo import DemoEmbedder
from songvec_assets.samples import read_sample_songs

_LATENT, _MEAN, _FALL, _NOISE = 512, 0.4, 0.5, 0.1
_SHARES = 0.35, 0.25
"""Of the variance about the mean: of the large clusters, and of the small ones."""
_BATCH, _MOST_LINES = 2_000, 6

Vectors = NDArray[np.float32]


def make_rows(n_rows: int, dimensions: int, seed: int = 1) -> Iterator[tuple[list[int], Vectors]]:
    """Unit vectors as the module says, a batch at a time: song_ids and (n, dimensions)."""
    draw = np.random.default_rng(seed)
    latent = min(_LATENT, dimensions)
    spectrum = np.arange(1, latent + 1, dtype=np.float32) ** np.float32(-_FALL)
    spectrum /= np.linalg.norm(spectrum)
    turn = draw.standard_normal((latent, dimensions), dtype=np.float32) / np.float32(math.sqrt(dimensions))
    common = draw.standard_normal(dimensions, dtype=np.float32)
    common *= np.float32(math.sqrt(_MEAN / (1 - _MEAN))) / np.linalg.norm(common)
    levels = []
    for share, n_clusters in zip(_SHARES, (round(math.sqrt(n_rows)), n_rows // 50 + 1), strict=True):
        centres = np.float32(math.sqrt(share)) * draw.standard_normal((n_clusters, latent), dtype=np.float32)
        sizes = draw.pareto(1.2, n_clusters) + 0.1
        levels.append((centres, sizes / sizes.sum()))
    for start in range(0, n_rows, _BATCH):
        n_here = min(_BATCH, n_rows - start)
        rows = np.float32(math.sqrt(1 - sum(_SHARES))) * draw.standard_normal((n_here, latent), dtype=np.float32)
        for centres, shares in levels:
            rows += centres[draw.choice(len(centres), n_here, p=shares)]
        vectors = (rows * spectrum) @ turn + common
        noise = draw.standard_normal(vectors.shape, dtype=np.float32)
        vectors += np.float32(_NOISE / math.sqrt(dimensions)) * noise
        yield list(range(start, start + n_here)), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_real_rows() -> Iterator[tuple[list[int], Vectors]]:
    """Unit vectors by the demo's model of each line of the sample songs, and of two to six lines that follow it."""
    songs = [lyrics.splitlines() for lyrics in read_sample_songs()["lyrics"].drop_nulls()]
    texts = {
        "\n".join(lines[start : start + n])
        for lines in songs
        for start in range(len(lines))
        for n in range(1, _MOST_LINES + 1)
    }
    embedder, ordered = DemoEmbedder(), sorted(texts)
    for start in range(0, len(ordered), _BATCH):
        here = ordered[start : start + _BATCH]
        yield list(range(start, start + len(here))), embedder.embed(here)


def share_by_bits(vectors: Vectors, n_queries: int = 100, n_nearest: int = 10) -> float:
    """The share of the nearest rows by cosine that are among as many nearest by bits about the mean.

    Args:
        vectors: unit vectors in random order, (n, dimensions); the first are the queries.
        n_queries, n_nearest: how many.
    """
    queries, others = vectors[:n_queries], vectors[n_queries:]
    exact = np.argsort(-(queries @ others.T), axis=1)[:, :n_nearest]
    signs = np.sign(others - vectors.mean(axis=0)).astype(np.float32)
    by_bits = np.argsort(-(np.sign(queries - vectors.mean(axis=0)) @ signs.T), axis=1)[:, :n_nearest]
    return mean(len(set(a) & set(b)) / n_nearest for a, b in zip(exact.tolist(), by_bits.tolist(), strict=True))
