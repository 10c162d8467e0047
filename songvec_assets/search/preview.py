"""A sample of the vectors to look at: a map of some songs, and the nearest neighbors of a few.

Vectors come from the cache, as in `vectors/index/neighbors`; the neighbors are found as a search finds them. When to
add here: another view of a sample. Keep out: how a chart is drawn (`defs/charts`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import StoreError
from songvec_assets.search.nearest import Hit, read_songs, search_songs
from songvec_assets.search.query import Query
from songvec_assets.songs.source import SongsSource
from songvec_assets.vectors.index.neighbors import LoadedRows, sample_rows
from songvec_assets.vectors.spec import TableSpec

_MAP_SONGS = 600
_PREVIEW_SONGS, _PREVIEW_NEIGHBORS = 8, 3
_CLUSTERS, _CLUSTERED_AXES, _ROUNDS = 8, 16, 20
_MIDDLE = 5


@dataclass(frozen=True)
class SongMap:
    """A sample of the table on its two main axes.

    Attributes:
        points: float32, (n, 2).
        clusters: of each point, from 0 on, (n,).
        titles: per cluster, of the songs nearest to its centre, nearest first.
        share: of the sample's variance that the two axes show.
        n_rows: of the table.
    """

    points: Float32Matrix
    clusters: NDArray[np.int64]
    titles: list[list[str]]
    share: float
    n_rows: int


@dataclass(frozen=True)
class Neighborhood:
    """A song, and the songs that a search for its vector finds."""

    name: str
    artist: str
    nearest: list[Hit]


@dataclass(frozen=True)
class Preview:
    """A map of a sample, and the nearest songs of a few."""

    map: SongMap
    neighborhoods: list[Neighborhood]


def preview_table(rows: LoadedRows, source: SongsSource, spec: TableSpec) -> Preview:
    """Draw a sample of the table; the same table gives the same sample.

    Args:
        rows: that the table holds, with their vectors in the cache.

    Raises:
        StoreError: the cache does not hold what is loaded.
    """
    database = rows.table.database
    song_ids, vectors = sample_rows(rows, _MAP_SONGS, np.random.default_rng(0))
    if not song_ids:
        raise StoreError(
            f"the cache in {rows.cache.storage} holds no row that table {rows.table.name} has: fill it, then load",
            "cache.missing",
        )
    components, share = project(vectors)
    clusters, middles = find_clusters(components[:, :_CLUSTERED_AXES])
    spread = np.linspace(0, len(song_ids) - 1, min(len(song_ids), _PREVIEW_SONGS)).astype(int)
    shown = {song_ids[place]: vectors[place] for place in spread}
    with database.get_connection("web") as connection:
        inner = [song_ids[place] for places in middles for place in places]
        songs = read_songs(connection, source, [*shown, *inner])
    titles = [[songs[song_ids[each]][0] for each in places if song_ids[each] in songs] for places in middles]
    neighborhoods = []
    for song_id in shown.keys() & songs.keys():
        asked = Query(shown[song_id], limit=_PREVIEW_NEIGHBORS + 1, model=spec.model)
        hits = search_songs(database, source, asked)
        nearest = [hit for hit in hits if hit.song_id != song_id][:_PREVIEW_NEIGHBORS]
        neighborhoods.append(Neighborhood(*songs[song_id][:2], nearest))
    song_map = SongMap(components[:, :2], clusters, titles, share, rows.n_rows)
    return Preview(song_map, sorted(neighborhoods, key=lambda each: each.name))


def project(vectors: Float32Matrix) -> tuple[Float32Matrix, float]:
    """Vectors on their principal axes, two at least, the main ones first; and the two main axes' share of the variance.

    Args:
        vectors: (n, dimensions).
    """
    centred = vectors - vectors.mean(axis=0)
    # of n songs and d values, n² is the smaller problem
    variances, axes = np.linalg.eigh(centred @ centred.T)
    lengths = np.sqrt(np.clip(variances[::-1], 0, None))
    components: Float32Matrix = np.pad(axes[:, ::-1] * lengths, ((0, 0), (0, 2))).astype(np.float32)
    total = float((lengths**2).sum())
    return components, float((lengths[:2] ** 2).sum()) / total if total else 1.0


def find_clusters(points: Float32Matrix, n_clusters: int = _CLUSTERS) -> tuple[NDArray[np.int64], list[list[int]]]:
    """Lloyd's k-means, which starts from points far from each other; deterministic.

    Args:
        points: (n, axes); at least one.

    Returns:
        The cluster of each point; and per cluster the places of the points nearest to its centre, nearest first.
    """
    places = [int(np.argmax(((points - points.mean(axis=0)) ** 2).sum(axis=1)))]
    while len(places) < min(n_clusters, len(points)):
        places.append(int(np.argmax(_distances(points, points[places]).min(axis=1))))
    centres = points[places]
    for _ in range(_ROUNDS):
        clusters = _distances(points, centres).argmin(axis=1)
        centres = np.stack(
            [points[clusters == each].mean(axis=0) if (clusters == each).any() else centres[each]
             for each in range(len(centres))]
        )  # fmt: skip
    from_centre = _distances(points, centres)
    middles = []
    for cluster in range(len(centres)):
        members = np.flatnonzero(clusters == cluster)
        middles.append(members[from_centre[members, cluster].argsort()][:_MIDDLE].tolist())
    return clusters, middles


def _distances(points: Float32Matrix, centres: Float32Matrix) -> NDArray[np.float32]:
    """Squared distances, (n points, n centres)."""
    squares: NDArray[np.float32] = (points**2).sum(axis=1)[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)
    return squares
