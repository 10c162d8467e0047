"""Runs that cannot do everything: what is complete is loaded and indexed, and the last line says what is missing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from songvec_assets import cli
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.table import STAGING, VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import environment_of
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.scenarios.test_graph_core import read_table

pytestmark = pytest.mark.slow

WIDTH = 50_000
FIRST, SECOND, THIRD = (f"{start:09d}-{start + WIDTH:09d}" for start in (0, WIDTH, 2 * WIDTH))
N_SONGS = 40
"""Of each range."""

Run = Callable[..., tuple[int, list[str]]]


def ids(number: int) -> list[int]:
    """The song_ids of a range, counted from 0."""
    return [number * WIDTH + each for each in range(1, N_SONGS + 1)]


@pytest.fixture
def run(
    database: Database,
    provider: Provider,
    songs: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """Types `songvec …` in this process, over three ranges; gives the exit code and what is printed."""
    songs(*((song_id, f"Song {song_id}", "Ann", "la") for number in range(3) for song_id in ids(number)))
    for name, value in {
        **environment_of(database, provider, tmp_path),
        "SONGVEC_TOKENS_PER_MINUTE": "1000000000",
        "SONGVEC_MAX_REQUEST_TEXTS": "10",
        "SONGVEC_CONCURRENCY": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def type_in(*command: str) -> tuple[int, list[str]]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.app(list(command))
        printed = "".join(capfd.readouterr())
        assert "Traceback" not in printed
        assert isinstance(ended.value.code, int)
        return ended.value.code, [line.strip() for line in printed.splitlines() if line.strip()]

    return type_in


def read_table_if_any(database: Database) -> dict[int, object]:
    with database.get_connection() as connection:
        is_there = VectorTable(database).exists(connection)
    return dict(read_table(database)) if is_there else {}


def folder_of(tmp_path: Path, key: str) -> Path:
    [path] = (tmp_path / "store").glob(f"embeddings/*/{key}")
    return path


def break_second_range(tmp_path: Path) -> None:
    """Put another range's folder where the second one's belongs: it cannot be filled until that is mended."""
    shutil.copytree(folder_of(tmp_path, FIRST), folder_of(tmp_path, FIRST).with_name(SECOND), dirs_exist_ok=True)


def test_a_range_that_cannot_be_filled_keeps_no_other_from_being_loaded_and_indexed(
    run: Run, database: Database, tmp_path: Path
) -> None:
    assert run("run", "--ranges", FIRST)[0] == 0
    break_second_range(tmp_path)
    code, lines = run("run")
    assert code == 1, lines
    assert set(read_table(database)) == {*ids(0), *ids(2)}
    assert VectorTable(database).index is not None
    assert lines[-1].startswith(
        f"Incomplete: {N_SONGS} songs are missing, in 1 of 3 ranges; the rest is loaded and indexed. {SECOND}: "
    ), lines
    assert f"{SECOND}/" in lines[-1]
    row = next(line.split() for line in lines if line.startswith("embedding_cache"))
    assert int(row[1]) == 2 * N_SONGS, "of the ranges that are complete"
    # here: dagster takes seconds to import, which the first command does
    import dagster as dg

    from songvec_assets.defs.instance import open_instance

    with open_instance() as instance:
        runs = instance.get_runs(dg.RunsFilter(tags={".dagster/repository": "__repository__@songvec_assets"}))
    assert {each.job_name for each in runs} == {"refresh"}
    statuses = [str(each.status.value) for each in runs]
    assert statuses == ["SUCCESS", "FAILURE", "FAILURE", "SUCCESS"], "what went on without the range, too, is shown"
    code, again = run("run")
    assert (code, again[-1]) == (1, lines[-1]), "each time until the cause is mended"
    code, lines = run("status")
    assert (code, any(line.startswith("Cannot be read:") for line in lines)) == (3, True), lines
    shutil.rmtree(folder_of(tmp_path, SECOND))
    code, lines = run("run")
    assert code == 0, lines
    assert len(read_table(database)) == 3 * N_SONGS


def test_what_a_budget_allowed_is_loaded_and_indexed(run: Run, database: Database, provider: Provider) -> None:
    code, lines = run("run", "--max-usd", "0.00003")
    n_loaded, index = len(read_table(database)), VectorTable(database).index
    assert code == 1, lines
    assert 0 < n_loaded < 3 * N_SONGS
    assert index is not None
    assert index.n_rows == n_loaded
    assert lines[-1].startswith(f"Incomplete: {3 * N_SONGS - n_loaded} songs are missing, in "), lines
    assert "; the rest is loaded and indexed. " in lines[-1]
    assert "raise SONGVEC_MAX_USD" in lines[-1]
    row = next(line.split() for line in lines if line.startswith("embedding_cache"))
    billed = provider.ledger()["tokens_billed"]
    assert row[1] == str(n_loaded)
    assert int(row[3].replace(",", "")) == billed, "of the range that is not complete too"
    assert run("run")[0] == 0
    assert {count for text, count in provider.texts().items() if text != "probe"} == {1}


def test_what_was_embedded_before_the_provider_refuses_is_loaded_and_indexed(
    run: Run, database: Database, provider: Provider
) -> None:
    provider.control(poison=[f"Song {song_id} " for song_id in ids(1)])
    code, lines = run("run")
    assert code == 1, lines
    assert set(read_table(database)) >= set(ids(0))
    assert not set(read_table(database)) & set(ids(1))
    assert VectorTable(database).index is not None
    assert lines[-1].startswith("Incomplete: "), lines
    assert SECOND in lines[-1]


def test_a_range_that_cannot_be_exported_keeps_no_other_from_being_embedded_loaded_and_indexed(
    run: Run, database: Database, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(
        database.adbc_uri,
        f"CREATE VIEW all_songs AS SELECT * FROM songs UNION ALL SELECT * FROM songs WHERE id = {ids(1)[0]}",
    )
    monkeypatch.setenv("SONGVEC_SONGS_TABLE", "all_songs")
    monkeypatch.setenv("SONGVEC_SONG_ID_COLUMN", "id")
    code, lines = run("embed")
    assert code == 1, lines
    assert len(provider.texts()) == 2 * N_SONGS + 1
    assert lines[-1].startswith("Incomplete: "), lines
    assert not read_table_if_any(database)
    code, lines = run("run")
    assert code == 1, lines
    assert set(read_table(database)) == {*ids(0), *ids(2)}
    assert VectorTable(database).index is not None
    assert "; the rest is loaded and indexed. " in lines[-1]
    assert f"{SECOND}: column 'id' of " in lines[-1]
    assert "must be unique" in lines[-1]


def test_a_changed_song_that_cannot_be_embedded_keeps_its_vector(run: Run, database: Database) -> None:
    assert run("run")[0] == 0
    before = read_table(database)
    execute(database.adbc_uri, f"UPDATE songs SET lyrics = 'other' WHERE id = {ids(1)[0]}")
    code, lines = run("run", "--max-usd", "0")
    after = read_table(database)
    assert code == 1, lines
    assert after.keys() == before.keys()
    assert (after[ids(1)[0]] == before[ids(1)[0]]).all()
    assert lines[-1].startswith("Incomplete: no song is missing, but some are not up to date; "), lines


def test_nothing_is_loaded_where_nothing_was_embedded(run: Run, database: Database, provider: Provider) -> None:
    provider.control(statuses=[{"status": 401}])
    code, lines = run("run")
    assert (code, "401" in lines[-1]) == (1, True), lines
    assert not any("fill the cache first" in line for line in lines), "the first failure is the one to mend"


def test_half_a_model_is_not_loaded_beside_the_one_that_serves(run: Run, database: Database) -> None:
    assert run("run")[0] == 0
    code, lines = run("swap", "--dimensions", "32", "--max-usd", "0.00003")
    assert (code, "raise SONGVEC_MAX_USD" in lines[-1]) == (1, True), lines
    with database.get_connection() as connection:
        assert not VectorTable(database, STAGING).exists(connection)
    assert len(read_table(database)[ids(0)[0]]) == 64
