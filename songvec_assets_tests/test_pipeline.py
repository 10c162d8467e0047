"""The public API: each step and each question as a method, also inside a running event loop, with no Dagster."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import songvec_assets
from songvec_assets import BudgetExceededError, Pipeline, Settings, SongIdRange, TableMismatchError
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider, vector_of

FIRST, SECOND = SongIdRange(0, 100), SongIdRange(100, 200)


@pytest.fixture
def begin(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path
) -> Callable[..., Pipeline]:
    """A pipeline over three songs in two ranges, of which nothing is done yet; each call is a new one."""
    songs((1, "Sea", "Ann", "waves and salt"), (2, "Hill", "Ben", "stones"), (150, "Moon", "Cy", "a silver light"))

    def make(**settings: object) -> Pipeline:
        given = {"query_prompt": "{query}"} | settings
        return Pipeline(make_pipeline(database, provider, tmp_path / "store", **given).settings)

    return make


def test_a_run_and_what_can_be_asked_afterwards(begin: Callable[..., Pipeline]) -> None:
    with begin() as songs:
        with pytest.raises(TableMismatchError, match="nothing is loaded yet, so there is nothing to check"):
            songs.verify()
        report = songs.run()
        assert [(each.range, each.n_embedded) for each in report.embed] == [(FIRST, 2), (SECOND, 1)]
        assert (sum(each.n_written for each in report.load.loads), report.index.built) == (3, True)
        assert songs.status().ranges.select("key", "n_loaded", "n_missing").rows() == [
            (FIRST.key, 2, 0),
            (SECOND.key, 1, 0),
        ]
        assert [each.n_embedded for each in songs.run().embed] == [0, 0]
        assert [hit.song_id for hit in songs.search("Moon by Cy\na silver light", limit=1)] == [150]
        assert (songs.estimate().n_texts, songs.estimate([FIRST], reembed=True).n_texts) == (0, 2)
        assert all(finding.passed for finding in songs.verify().values())
        assert any(line.startswith("embed: 0 texts") for line in songs.dry_run().describe())
        json.dumps(songs.status().as_dict())


def test_vectors_are_a_frame_of_the_songs_that_have_one(begin: Callable[..., Pipeline]) -> None:
    with begin() as songs:
        songs.run()
        frame = songs.embeddings([150, 1, 99])
        assert frame.schema == {"song_id": pl.Int32, "embedding": pl.Array(pl.Float32, 64)}
        assert frame["song_id"].to_list() == [1, 150]
        np.testing.assert_allclose(
            frame["embedding"].to_numpy()[0], vector_of("Sea by Ann\nwaves and salt", 64), atol=1e-6
        )
        assert songs.embeddings(np.array([2]))["song_id"].to_list() == [2]
        assert songs.embeddings([]).shape == (0, 2)


def test_it_works_where_an_event_loop_runs(begin: Callable[..., Pipeline]) -> None:
    async def cell() -> list[int]:
        with begin() as songs:
            songs.run()
            return [hit.song_id for hit in songs.search("Hill by Ben\nstones", limit=1)]

    assert asyncio.run(cell()) == [2]


def test_what_was_embedded_before_a_budget_ended_is_loaded_and_the_error_raised(begin: Callable[..., Pipeline]) -> None:
    with begin() as songs:
        songs.export()
        songs.embed([FIRST])
    with begin(max_usd=0.0) as songs:
        with pytest.raises(BudgetExceededError):
            songs.run()
        assert songs.status().total["n_loaded"] == 2
        assert songs.table.index is not None


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [64, 32])
def test_an_allowed_swap_ends_the_run_only_if_the_table_is_another(
    begin: Callable[..., Pipeline], songs: Callable[..., None], dimensions: int
) -> None:
    with begin() as first:
        first.run()
    songs((3, "Dune", "Dee", "sand"), (151, "Star", "Eve", "light"))
    with begin(swap=True, embedding_dimensions=dimensions) as again:
        again.export()
        again.embed([FIRST])
    with begin(swap=True, embedding_dimensions=dimensions, max_usd=0.0) as again:
        with pytest.raises(BudgetExceededError):
            again.run()
        assert again.status().tables == {"song_embeddings": f"vector(64) by {again.settings.model}"}
        assert again.table.count_rows() == (4 if dimensions == 64 else 3)


def test_what_serves_another_model_uses_the_database_that_is_closed_and_cancelled(
    begin: Callable[..., Pipeline],
) -> None:
    with begin() as songs:
        songs.run()
        songs.swap(dimensions=32)
        loaded = songs.as_loaded()
        assert loaded.settings.dimensions == 32
        assert loaded.database is songs.database
        with (
            pytest.raises(songvec_assets.DatabaseError, match="cancel"),
            loaded.database.get_connection() as connection,
        ):
            songs.cancel()
            connection.exec_driver_sql("SELECT pg_sleep(30)")


def test_a_range_that_fails_is_raised_after_the_others_are_done(begin: Callable[..., Pipeline]) -> None:
    with begin() as songs:
        songs.export()
        (songs.storage.root / "songs" / f"{FIRST.key}.parquet").write_bytes(b"PAR1" + b"x" * 100 + b"PAR1")
        with pytest.raises(songvec_assets.StoreError, match="is damaged") as raised:
            songs.embed()
        assert raised.value.__notes__ == [f"not complete: {FIRST.key}; the other ranges are embedded"]
        assert songs.cache.read_manifest(SECOND).complete is not None


@pytest.mark.slow
def test_another_size_is_swapped_in_and_back(begin: Callable[..., Pipeline]) -> None:
    with begin() as songs:
        songs.run()
        report = songs.swap(dimensions=32)
        assert (report.load.comparison is not None, songs.table.spec.dimensions) == (True, 32)
        assert songs.embeddings([1])["embedding"].dtype == pl.Array(pl.Float32, 32)
        assert len(songs.search("waves", limit=3)) == 3, "searches need no new settings"
        assert songs.roll_back().dimensions == 64


def test_settings_come_from_the_environment_and_from_a_file_where_that_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("SONGVEC_CONCURRENCY=7\nSONGVEC_LISTS=9\n")
    monkeypatch.setenv("SONGVEC_LISTS", "8")
    settings = Pipeline.from_env(max_usd=5.0).settings
    assert (settings.concurrency, settings.lists, settings.max_usd) == (7, 8, 5.0)


def test_the_public_names_are_there_and_no_others_are_promised() -> None:
    assert all(getattr(songvec_assets, name) is not None for name in songvec_assets.__all__)
    assert (songvec_assets.Pipeline, songvec_assets.Settings) == (Pipeline, Settings)
    assert {*songvec_assets.__all__} <= {*dir(songvec_assets)}
    with pytest.raises(AttributeError, match="has no attribute 'Deployment'"):
        _ = songvec_assets.Deployment


HEAVY = ("dagster", "matplotlib", "aiohttp")


def loaded_by(statement: str, folder: Path, **environment: str) -> set[str]:
    """The modules that a fresh interpreter has after a statement."""
    command = [sys.executable, "-c", f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()}


def test_an_import_costs_nothing_and_the_api_needs_no_dagster(tmp_path: Path) -> None:
    assert not loaded_by("import songvec_assets", tmp_path) & {*HEAVY, "polars", "numpy", "sqlalchemy"}
    assert not loaded_by("from songvec_assets import Pipeline", tmp_path) & {"dagster", "matplotlib"}
    assert (Path(songvec_assets.__file__).parent / "py.typed").exists()
