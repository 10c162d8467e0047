"""The whole line below Dagster: export, fill, load, index, search; twice, and after changes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from songvec_assets.cache.plan import FillReport
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.search.nearest import search_songs
from songvec_assets.search.queries import embed_queries
from songvec_assets.search.query import Query
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.watch import look_at_source
from songvec_assets.vectors.load import RangeLoad
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider, vector_of
from songvec_assets_tests.vectors.conftest import upload
from songvec_assets_tests.vectors.indexes import build_index


def run_all(pipeline: Pipeline) -> tuple[list[FillReport], list[RangeLoad]]:
    """Export, fill and load everything once."""
    cache_songs_to_parquet(pipeline.source, pipeline.store.songs, pipeline.tiling)
    fills: list[FillReport] = []
    pipeline.filler().fill_ranges(list(pipeline.tiling), fills.append)
    loads = upload(pipeline.database, pipeline.cache, pipeline.table_spec, pipeline.tiling)
    return fills, loads


def read_table(database: Database) -> dict[int, np.ndarray]:
    """What the table holds."""
    with database.get_connection() as connection:
        rows = connection.execute(sa.text("SELECT song_id, embedding::text FROM song_embeddings"))
        return {song_id: np.array(text[1:-1].split(","), dtype=np.float32) for song_id, text in rows}


def test_songs_become_a_table_that_a_search_finds(
    songs: Callable[..., None], pipeline: Pipeline, provider: Provider
) -> None:
    songs((1, "Sea", "Ann", "waves and salt"), (2, "Hill", "Ben", None), (150, "Moon", "Cy", "a silver light"))
    fills, loads = run_all(pipeline)
    assert [(fill.range.key, fill.n_new, fill.error) for fill in fills] == [
        ("000000000-000000100", 2, None),
        ("000000100-000000200", 1, None),
    ]
    assert sum(load.n_written for load in loads) == 3
    table = read_table(pipeline.database)
    np.testing.assert_allclose(table[1], vector_of("Sea by Ann\nwaves and salt", 64), atol=1e-6)
    np.testing.assert_allclose(table[2], vector_of("Hill by Ben", 64), atol=1e-6)
    build_index(pipeline.database, pipeline.cache, pipeline.table_spec)
    hits = search_songs(pipeline.database, pipeline.source, Query(table[150], limit=2))
    assert (hits[0].song_id, hits[0].name, round(hits[0].similarity, 3)) == (150, "Moon", 1.0)
    assert embed_queries(pipeline.embedder(), ["moonlight"], None).shape == (1, 64)
    assert pipeline.status().total["n_missing"] == 0


def test_a_second_run_sends_no_request_and_writes_nothing(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path
) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", "stones"))
    run_all(make_pipeline(database, provider, tmp_path))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    requests = provider.ledger()["requests"]
    fills, loads = run_all(make_pipeline(database, provider, tmp_path))
    assert [fill.n_unchanged for fill in fills] == [2]
    assert [load.n_written + load.n_deleted for load in loads] == [0]
    assert provider.ledger()["requests"] == requests
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_changed_a_new_and_a_deleted_song_cost_two_texts(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path
) -> None:
    songs(*((song_id, f"Song {song_id}", "Ann", "la la") for song_id in range(1, 11)))
    run_all(make_pipeline(database, provider, tmp_path))
    songs((3, "Song 3", "Ann", "new words"), (11, "Song 11", "Ann", "la la"))
    with database.get_connection() as connection:
        connection.execute(sa.text("DELETE FROM songs WHERE id = 7"))
    provider.reset_ledger()
    fills, loads = run_all(make_pipeline(database, provider, tmp_path))
    assert (fills[0].n_new, fills[0].n_changed, fills[0].n_deleted, fills[0].n_unchanged) == (1, 1, 1, 8)
    assert set(provider.texts()) - {"probe"} == {"Song 3 by Ann\nnew words", "Song 11 by Ann\nla la"}
    assert (loads[0].n_written, loads[0].n_deleted) == (2, 2)
    assert set(read_table(database)) == {*range(1, 12)} - {7}


def test_songs_with_the_same_text_share_a_request_slot(
    songs: Callable[..., None], pipeline: Pipeline, provider: Provider
) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Sea", "Ann", "waves"), (3, "Sea", "Ann", "waves"))
    run_all(pipeline)
    assert provider.texts()["Sea by Ann\nwaves"] == 1
    assert len(read_table(pipeline.database)) == 3


def create_songs(database: Database, columns: str, rows: str) -> None:
    execute(
        database.adbc_uri, f"CREATE TABLE songs (id integer PRIMARY KEY, {columns}); INSERT INTO songs VALUES {rows}"
    )


ONLY_NAMED = [
    ("{name}\n{lyrics}", "name text, lyrics text", "(1, 'Sea', 'waves'), (2, 'Hill', NULL)", {"Sea\nwaves", "Hill"}),
    ("{name}", "name text", "(1, 'Sea'), (2, 'Hill')", {"Sea", "Hill"}),
    # there, and not of a kind that could be embedded
    ("{name}", "name text, artist integer", "(1, 'Sea', 7), (2, 'Hill', NULL)", {"Sea", "Hill"}),
    # there, and empty
    ("{name}", "name text, artist text", "(1, 'Sea', ''), (2, 'Hill', NULL)", {"Sea", "Hill"}),
    ("{artist}: {lyrics}", "artist text, lyrics text", "(1, 'Ann', 'waves'), (2, 'Ben', NULL)", {"Ann: waves", "Ben:"}),
]


@pytest.mark.parametrize(("template", "columns", "rows", "texts"), ONLY_NAMED)
def test_only_the_columns_that_the_template_names_are_needed(
    database: Database, provider: Provider, tmp_path: Path, template: str, columns: str, rows: str, texts: set[str]
) -> None:
    create_songs(database, columns, rows)
    pipeline = make_pipeline(database, provider, tmp_path / "store", text_template=template)
    fills, loads = run_all(pipeline)
    assert [(fill.n_songs, fill.n_rejected, fill.error) for fill in fills] == [(2, 0, None)]
    assert {*provider.texts()} - {"probe"} == texts
    assert sum(load.n_written for load in loads) == 2
    vector = pipeline.embed_query("waves")
    hits = search_songs(database, pipeline.source, Query(vector))
    shown = {hit.song_id: (hit.name, hit.artist) for hit in hits}
    assert (shown[1][0] or "Sea", shown[1][1] in ("", "Ann")) == ("Sea", True)
    assert look_at_source(pipeline.source, None).look.state.n_songs == 2
    assert pipeline.dry_run().missing.n_missing == 0
    pipeline.preview()


@pytest.mark.parametrize(
    ("template", "rejected"),
    [
        ("{name} by {artist}", {1: "the song has no name", 2: "the song has no artist", 3: "the song has no name"}),
        ("{artist}", {2: "the song has no artist", 3: "the song has no artist"}),
        ("{name}", {1: "the song has no name", 3: "the song has no name"}),
        ("{lyrics}", {2: "the song has no lyrics", 3: "the song has no lyrics"}),
        ("words: {lyrics}", {2: "the song has no lyrics", 3: "the song has no lyrics"}),
    ],
)
def test_a_song_is_rejected_for_what_the_template_names_and_it_lacks(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path,
    template: str, rejected: dict[int, str],
) -> None:  # fmt: skip
    songs((1, " ", "Ann", "waves"), (2, "Sea", None, " \n"), (3, None, "", None), (4, "Hill", "Ben", "la"))
    pipeline = make_pipeline(database, provider, tmp_path / "store", text_template=template)
    (fill,), _ = run_all(pipeline)
    snapshot = pipeline.store.songs.read(fill.range)
    found = {song_id: reason for song_id, reason in snapshot.select("song_id", "rejected").iter_rows() if reason}
    assert found == rejected
    assert (fill.n_rejected, fill.n_embedded) == (len(rejected), 4 - len(rejected))


def test_a_template_that_needs_less_takes_songs_that_were_rejected_even_where_exports_read_only_what_is_newer(
    database: Database, provider: Provider, tmp_path: Path
) -> None:
    create_songs(
        database, "name text, artist text, lyrics text, changed timestamptz DEFAULT now()",
        "(1, 'Sea', NULL, 'waves'), (2, 'Hill', 'Ben', NULL)",
    )  # fmt: skip
    given = {"updated_at_column": "changed", "text_template": "{name} by {artist}"}
    pipeline = make_pipeline(database, provider, tmp_path / "store", **given)
    pipeline.export()
    pipeline.filler().fill_ranges(list(pipeline.tiling), lambda _: None)
    assert {*provider.texts()} - {"probe"} == {"Hill by Ben"}
    changed = make_pipeline(database, provider, tmp_path / "store", **given | {"text_template": "{name}"})
    changed.export()
    changed.filler(confirm_reembedding=True).fill_ranges(list(changed.tiling), lambda _: None)
    assert {*provider.texts()} - {"probe", "Hill by Ben"} == {"Sea", "Hill"}
