"""The whole line below Dagster: export, fill, load, index, search; twice, and after changes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from songvec_assets.cache.fill import FillReport
from songvec_assets.deployment import Deployment
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.status import measure_status
from songvec_assets.vectors.ivfflat import bring_index_up_to_date
from songvec_assets.vectors.load import RangeLoad, upload_cached_embeddings_to_database
from songvec_assets.vectors.search import embed_query, search_songs
from songvec_assets_tests.conftest import deploy
from songvec_assets_tests.provider import Provider, vector_of


def run_all(deployment: Deployment) -> tuple[list[FillReport], list[RangeLoad]]:
    """Export, fill and load everything once."""
    cache_songs_to_parquet(deployment.database, deployment.source, deployment.store.songs, deployment.tiling)
    fills: list[FillReport] = []
    deployment.filler().fill_ranges(list(deployment.tiling), fills.append)
    loads = upload_cached_embeddings_to_database(
        deployment.database, deployment.cache, deployment.table_spec, deployment.tiling
    )
    return fills, loads


def read_table(database: Database) -> dict[int, np.ndarray]:
    """What the table holds."""
    with database.get_connection() as connection:
        rows = connection.execute(sa.text("SELECT song_id, embedding::text FROM song_embeddings"))
        return {song_id: np.array(text[1:-1].split(","), dtype=np.float32) for song_id, text in rows}


def test_songs_become_a_table_that_a_search_finds(
    songs: Callable[..., None], deployment: Deployment, provider: Provider
) -> None:
    songs((1, "Sea", "Ann", "waves and salt"), (2, "Hill", "Ben", None), (150, "Moon", "Cy", "a silver light"))
    fills, loads = run_all(deployment)
    assert [(fill.range.key, fill.n_new, fill.error) for fill in fills] == [
        ("000000000-000000100", 2, None),
        ("000000100-000000200", 1, None),
    ]
    assert sum(load.n_written for load in loads) == 3
    table = read_table(deployment.database)
    np.testing.assert_allclose(table[1], vector_of("Sea by Ann\nwaves and salt", 64), atol=1e-6)
    np.testing.assert_allclose(table[2], vector_of("Hill by Ben", 64), atol=1e-6)
    bring_index_up_to_date(deployment.database, deployment.cache, deployment.table_spec)
    hits = search_songs(deployment.database, deployment.source, deployment.table_spec, table[150], limit=2)
    assert (hits[0].song_id, hits[0].name, round(hits[0].similarity, 3)) == (150, "Moon", 1.0)
    assert embed_query(deployment.embedder(), "moonlight").shape == (64,)
    assert measure_status(deployment).total.n_missing == 0


def test_a_second_run_sends_no_request_and_writes_nothing(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path
) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", "stones"))
    run_all(deploy(database, provider, tmp_path))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    requests = provider.ledger()["requests"]
    fills, loads = run_all(deploy(database, provider, tmp_path))
    assert [fill.n_unchanged for fill in fills] == [2]
    assert [load.n_written + load.n_deleted for load in loads] == [0]
    assert provider.ledger()["requests"] == requests
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_changed_a_new_and_a_deleted_song_cost_two_texts(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path
) -> None:
    songs(*((song_id, f"Song {song_id}", "Ann", "la la") for song_id in range(1, 11)))
    run_all(deploy(database, provider, tmp_path))
    songs((3, "Song 3", "Ann", "new words"), (11, "Song 11", "Ann", "la la"))
    with database.get_connection() as connection:
        connection.execute(sa.text("DELETE FROM songs WHERE id = 7"))
    provider.reset_ledger()
    fills, loads = run_all(deploy(database, provider, tmp_path))
    assert (fills[0].n_new, fills[0].n_changed, fills[0].n_gone, fills[0].n_unchanged) == (1, 1, 1, 8)
    assert set(provider.texts()) - {"probe"} == {"Song 3 by Ann\nnew words", "Song 11 by Ann\nla la"}
    assert (loads[0].n_written, loads[0].n_deleted) == (2, 2)
    assert set(read_table(database)) == {*range(1, 12)} - {7}


def test_songs_with_the_same_text_share_a_request_slot(
    songs: Callable[..., None], deployment: Deployment, provider: Provider
) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Sea", "Ann", "waves"), (3, "Sea", "Ann", "waves"))
    run_all(deployment)
    assert provider.texts()["Sea by Ann\nwaves"] == 1
    assert len(read_table(deployment.database)) == 3
