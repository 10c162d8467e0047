"""What a person looks at: a map that keeps near what is near, clusters, and neighbours that are the nearest."""

from pathlib import Path

import numpy as np
import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.search.preview import find_clusters, preview_table, project
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.source import find_source
from songvec_assets.vectors.index.neighbors import LoadedRows, sample_rows
from songvec_assets.vectors.table import VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.vectors.conftest import SPEC, load, make_vector, put
from songvec_assets_tests.vectors.indexes import build_index


def two_heaps(n: int, dimensions: int = 16) -> np.ndarray:
    draw = np.random.default_rng(0)
    centres = 5 * draw.standard_normal((2, dimensions))
    return np.float32(centres[np.arange(n) % 2] + 0.1 * draw.standard_normal((n, dimensions)))


class TestProjection:
    def test_distances_of_a_plane_are_kept(self) -> None:
        draw = np.random.default_rng(1)
        plane = np.float32(draw.standard_normal((30, 2)) @ np.linalg.qr(draw.standard_normal((9, 2)))[0].T + 3)
        components, share = project(plane)
        there = np.linalg.norm(plane[:, None] - plane[None], axis=2)
        here = np.linalg.norm(components[:, None, :2] - components[None, :, :2], axis=2)
        np.testing.assert_allclose(here, there, atol=1e-4)
        assert share == pytest.approx(1.0)

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_few_rows_have_two_axes_all_the_same(self, n: int) -> None:
        components, share = project(two_heaps(n))
        assert components.shape == (n, n + 2)
        assert np.isfinite(components).all()
        assert 0 <= share <= 1


class TestClusters:
    def test_two_heaps_are_two_clusters_and_their_middles_lie_in_them(self) -> None:
        points = two_heaps(40)
        clusters, middles = find_clusters(points, 2)
        assert len(set(clusters[::2])) == len(set(clusters[1::2])) == 1
        assert clusters[0] != clusters[1]
        assert [{int(clusters[place]) for place in places} for places in middles] == [{0}, {1}]
        centre = points[clusters == 0].mean(axis=0)
        nearest = int(np.argmin(np.linalg.norm(points - centre, axis=1)))
        assert middles[0][0] == nearest

    @pytest.mark.parametrize("n", [1, 3])
    def test_fewer_points_than_clusters_are_enough(self, n: int) -> None:
        clusters, middles = find_clusters(two_heaps(n))
        assert len(clusters) == n
        assert sorted(place for places in middles for place in places) == list(range(n))

    def test_equal_points_end(self) -> None:
        clusters, _ = find_clusters(np.ones((5, 3), np.float32), 3)
        assert set(clusters) == {0}


def test_a_sample_is_of_rows_of_the_table_each_once(database: Database, cache: ModelCache) -> None:
    put(cache, range(250))
    load(database, cache)
    song_ids, vectors = sample_rows(LoadedRows.of(VectorTable(database), cache), 100, np.random.default_rng(0))
    assert len(set(song_ids)) == len(vectors) == 100
    np.testing.assert_allclose(vectors, [make_vector(song_id) for song_id in song_ids], atol=1e-6)


def test_neighbours_are_the_nearest_songs_without_the_song_itself(
    database: Database, cache: ModelCache, tmp_path: Path
) -> None:
    put(cache, range(60))
    load(database, cache)
    build_index(database, cache, SPEC)
    execute(
        database.adbc_uri,
        "CREATE TABLE songs AS SELECT n AS id, 'song ' || n AS name, 'a' AS artist, 'la' AS lyrics "
        "FROM generate_series(0, 59) AS n; ALTER TABLE songs ADD PRIMARY KEY (id)",
    )
    preview = preview_table(
        LoadedRows.of(VectorTable(database), cache), find_source(database, PostgresSettings()), SPEC
    )
    assert (preview.map.n_rows, preview.map.points.shape, len(preview.neighborhoods)) == (60, (60, 2), 8)
    assert {title for titles in preview.map.titles for title in titles} <= {f"song {n}" for n in range(60)}
    for each in preview.neighborhoods:
        song_id = int(each.name.removeprefix("song "))
        others = sorted(set(range(60)) - {song_id}, key=lambda n: -make_vector(n) @ make_vector(song_id))
        assert [hit.song_id for hit in each.nearest] == others[:3]
    execute(database.adbc_uri, "DELETE FROM songs WHERE id < 50")
    gone = preview_table(LoadedRows.of(VectorTable(database), cache), find_source(database, PostgresSettings()), SPEC)
    assert len(gone.neighborhoods) < 8, "songs that are gone from the source are left out"
