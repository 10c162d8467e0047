"""What only looks writes nothing: no folder, no file, no schema, and it lets no store and database know each other."""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app
from songvec_assets.defs.resources import PostgresResource
from songvec_assets.errors import SourceError, StoreError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_value
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets_tests import warm
from songvec_assets_tests.administration import dispose, execute, with_parts
from songvec_assets_tests.conftest import TILING, environment_of, make_pipeline
from songvec_assets_tests.provider import Provider

SONGS = "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)"
LOOKS = (
    ["status"],
    ["status", "--json"],
    ["estimate", "--no-refresh"],
    ["run", "--dry-run"],
    ["search", "waves"],
    ["verify"],
    ["settings"],
    ["load"],
)


@pytest.fixture
def mistyped(server_url: str) -> Iterator[Database]:
    """A database that has songs, and nothing of ours."""
    name = f"mistyped_{uuid.uuid4().hex[:12]}"
    execute(server_url, f"CREATE DATABASE {name}")
    url = with_parts(server_url, database=name)
    execute(url, SONGS)
    execute(url, "INSERT INTO songs VALUES (1, 'Sea', 'Ann', 'waves')")
    yield Database(url)
    dispose(url)
    execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def environment(provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Database], None]:
    """Sets the environment of somebody who works with a database, in a folder of their own."""
    monkeypatch.chdir(tmp_path)

    def use(database: Database) -> None:
        for name, value in environment_of(database, provider, tmp_path).items():
            monkeypatch.setenv(name, value)

    return use


def made_of_ours(database: Database) -> list[tuple]:
    """Our schema and the extension, where they are in a database."""
    return execute(
        database.adbc_uri,
        "SELECT nspname FROM pg_namespace WHERE nspname = 'songvec' UNION ALL "
        "SELECT extname FROM pg_extension WHERE extname = 'vector'",
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dagster.BetaWarning", "ignore:InitResourceContext.dagster_run:DeprecationWarning")
def test_looking_creates_nothing_and_binds_nothing(
    mistyped: Database, environment: Callable[[Database], None], tmp_path: Path, provider: Provider
) -> None:
    environment(mistyped)
    for command in LOOKS:
        result = CliRunner().invoke(app, command)
        assert "schema" not in str(result.exception), command
        assert not (tmp_path / "store").exists(), command
        assert made_of_ours(mistyped) == [], command
    pipeline = make_pipeline(mistyped, provider, tmp_path / "store")
    assert (pipeline.read_inventory(with_table=False, with_source=False).behind, pipeline.held_ranges()) == (
        [],
        [SongIdRange(0, 100)],
    )
    assert made_of_ours(mistyped) == []
    assert not (tmp_path / "store").exists()


@pytest.mark.filterwarnings("ignore::dagster.BetaWarning", "ignore:InitResourceContext.dagster_run:DeprecationWarning")
def test_a_database_without_songs_is_refused_before_anything_is_bound(
    mistyped: Database, environment: Callable[[Database], None], tmp_path: Path, provider: Provider
) -> None:
    environment(mistyped)
    execute(mistyped.adbc_uri, "DROP TABLE songs")
    for command in ("run", "embed", "estimate"):
        assert CliRunner().invoke(app, [command]).exit_code == 1, command
    with pytest.raises(SourceError, match="no table songs"):
        make_pipeline(mistyped, provider, tmp_path / "store").filler()
    assert made_of_ours(mistyped) == []
    assert not (tmp_path / "store").exists()


def test_after_a_look_at_a_mistyped_database_the_right_one_is_bound(
    mistyped: Database,
    database: Database,
    songs: Callable[..., None],
    environment: Callable[[Database], None],
    provider: Provider,
    tmp_path: Path,
) -> None:
    songs((1, "Sea", "Ann", "waves"))
    environment(mistyped)
    looked = CliRunner().invoke(app, ["status", "--json"])
    assert (looked.exit_code, json.loads(looked.stdout)["missing"]) == (3, 1), "the song is not exported yet"
    right = make_pipeline(database, provider, tmp_path / "store", range_size=50_000, song_id_stop=16_000_000).settings
    early = Pipeline(right)
    assert early.read_inventory(with_table=False, with_source=False).behind == [], (
        "it looked before another one bound them"
    )
    Pipeline(right).export()
    early.export()
    store_id = json.loads((tmp_path / "store" / "store.json").read_text())["store_id"]
    with database.get_connection() as connection:
        assert read_value(connection, "store_id") == store_id
    refused = CliRunner().invoke(app, ["status"])
    assert isinstance(refused.exception, StoreError)
    assert "belongs to another database" in str(refused.exception)
    elsewhere = make_pipeline(database, provider, tmp_path / "another")
    with pytest.raises(StoreError, match="belongs to another database"):
        elsewhere.read_inventory()
    with pytest.raises(StoreError, match="belongs to another database"):
        elsewhere.export()
    assert not (tmp_path / "another").exists()
    assert made_of_ours(mistyped) == []
    Pipeline(right).export()


def test_the_resource_s_engine_and_connection_make_nothing_in_a_database_that_is_not_ours(
    mistyped: Database, environment: Callable[[Database], None]
) -> None:
    environment(mistyped)
    with PostgresResource().get_engine().connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    with PostgresResource().get_connection("web") as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    assert made_of_ours(mistyped) == []


def test_looking_does_not_cut_the_tail_where_the_stop_was_raised(
    pipeline: Pipeline, songs: Callable[..., None], tmp_path: Path
) -> None:
    songs((1_050, "Sea", "Ann", "waves"), (5_000, "Hill", "Ben", "stones"))
    pipeline.export()
    pipeline.filler().fill_ranges(list(TILING), lambda _: None)
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    raised = Pipeline(pipeline.settings.model_copy(update={"song_id_stop": 2_000}))
    assert raised.read_inventory(with_table=False, with_source=False).behind == []
    assert raised.held_ranges() == [SongIdRange(1_000, 1_100), raised.tiling.tail]
    assert raised.estimate({*raised.held_ranges()}).n_songs == 2
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before
    raised.export()
    assert raised.cache.ranges() == [SongIdRange(1_000, 1_100), raised.tiling.tail]


FIRST_START = """
import sys, time
from pathlib import Path
from songvec_assets.cache.store import open_store
from songvec_assets.pipeline import Pipeline
from songvec_assets.settings import Settings
from songvec_assets.songs.ranges import Tiling
from songvec_assets.storage.local import LocalStorage

folder, url = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
start = float(sys.stdin.readline())
stores = []
for n in range(20):
    while time.time() < start + n / 20:
        pass
    stores.append(open_store(LocalStorage(folder / str(n)), Tiling(100, 1_000)).store_id)
while time.time() < start + 1.2:
    pass
given = {"postgres_url": url, "fireworks_api_key": "k", "storage": str(folder / "bound")}
pipeline = Pipeline(Settings(range_size=100, song_id_stop=1_000, **given))
pipeline.bind()
print(*stores, pipeline.store.store_id)
"""


@pytest.mark.slow
def test_two_first_starts_at_once_bind_one_pair(mistyped: Database, tmp_path: Path) -> None:
    processes = [warm.start(["-c", FIRST_START, str(tmp_path), mistyped.url]) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    start = time.time() + 0.2
    for process in processes:
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    first, second = (process.communicate()[0].split() for process in processes)
    assert first == second
    assert len({*first}) == len(first) == 21
    with mistyped.get_connection() as connection:
        assert read_value(connection, "store_id") == first[-1]
    assert [path.name for path in (tmp_path / "bound").iterdir()] == ["store.json"]
