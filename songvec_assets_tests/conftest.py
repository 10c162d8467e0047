"""Real parts for tests: an embedded Postgres a database a test, cloned from a template; a provider in its process."""

import contextlib
import functools
import getpass
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import cast, get_args

import pytest
import sqlalchemy as sa

from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.settings import Settings, variables
from songvec_assets.songs.ranges import Tiling
from songvec_assets.storage import objects
from songvec_assets_tests.administration import borrow_database, dispose, execute, with_parts
from songvec_assets_tests.clouds import Cloud, CloudKind, running_cloud
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.provider import Provider, running_provider
from songvec_assets_tests.s3 import S3, Kind, running_s3

TEMPLATE = "songvec_template"
TILING = Tiling(width=100, stop=1_000)

BEGUN_FIRST = [
    "deploy/test_compose.py",
    "browser/test_story.py",
    "benchmarks/test_chaos_db.py",
    "cli/test_commands.py",
    "benchmarks/test_campaigns.py",
    "benchmarks/test_short_forms.py",
    "scenarios/test_kills.py",
    "scenarios/test_wheel.py",
    "scenarios/test_hangup.py",
    "browser/test_search_page.py",
    "benchmarks/test_search.py",
]
"""Files of few tests that take long, or wait: begun last, one worker would be at them alone."""

# else each process that a test starts compiles our modules anew: a third of a second
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(trylast=True)  # of the tests that run, after `-m` chose them
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where workers take files, one after the other: BEGUN_FIRST, then files of many tests before those of few."""
    if not hasattr(config, "workerinput"):
        return
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(BEGUN_FIRST)}
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (places.get(item.path, len(places)), -sizes[item.path], str(item.path)))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests reaches a test."""
    for variable in (*variables(), "DAGSTER_HOME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True, scope="session")
def _no_wait_for_the_disk() -> Iterator[None]:
    """What this process writes is not synced, as with the server below; tests of that look at the calls."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """An embedded server a test worker, with a template database that has the schema."""
    # a short path: the server's socket lies in its folder, and socket paths end at 107 characters
    with tempfile.TemporaryDirectory(prefix=f"songvec-{getpass.getuser()}-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        url = start_embedded_server(Path(folder) / "pg").url
        # most tests would wait for the disk, and none takes the machine's power away
        execute(url, "ALTER SYSTEM SET fsync = off")
        execute(url, "SELECT pg_reload_conf()")
        execute(url, f"CREATE DATABASE {TEMPLATE}")
        template = Database(with_parts(url, database=TEMPLATE))
        ensure_schema(template)
        dispose(template.url)
        yield url


@pytest.fixture
def database(server_url: str) -> Iterator[Database]:
    """A database with our schema and nothing else in it."""
    with borrow_database(server_url, TEMPLATE) as database:
        yield database


@pytest.fixture
def bare_url(server_url: str) -> Iterator[str]:
    """URL of a fresh database with neither the extension nor our schema."""
    name = f"bare_{uuid.uuid4().hex[:12]}"
    execute(server_url, f"CREATE DATABASE {name}")
    url = with_parts(server_url, database=name)
    yield url
    dispose(url)
    execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def pooled(database: Database) -> Iterator[Database]:
    """The database through a pooler with two sessions."""
    with running_pgbouncer(database.url) as url:
        yield Database(url)
        dispose(url)


@pytest.fixture
def songs(database: Database) -> Callable[..., None]:
    """Creates `songs` and puts rows into it: songs((1, "Name", "Artist", "lyrics"), …)."""

    def insert(*rows: tuple[int, str | None, str | None, str | None]) -> None:
        with database.get_connection() as connection:
            connection.execute(
                sa.text(
                    "CREATE TABLE IF NOT EXISTS songs (id integer PRIMARY KEY, name text, artist text, lyrics text)"
                )
            )
            for song_id, name, artist, lyrics in rows:
                connection.execute(
                    sa.text("""
                        INSERT INTO songs VALUES (:id, :name, :artist, :lyrics) ON CONFLICT (id)
                        DO UPDATE SET name = excluded.name, artist = excluded.artist, lyrics = excluded.lyrics
                    """),
                    {"id": song_id, "name": name, "artist": artist, "lyrics": lyrics},
                )

    return insert


@pytest.fixture(scope="session")
def provider_process() -> Iterator[Provider]:
    """A provider per test worker: to start one takes longer than most tests."""
    with running_provider() as running:
        yield running


@pytest.fixture
def provider(provider_process: Provider) -> Provider:
    """A well-behaved provider with an empty ledger; `provider.control(…)` makes it misbehave."""
    provider_process.begin_again()
    return provider_process


@pytest.fixture(scope="session")
def start_s3() -> Iterator[Callable[[Kind], S3]]:
    """Starts an S3 server of a kind, once per test worker."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda kind: stack.enter_context(running_s3(kind)))


@pytest.fixture
def use_s3(start_s3: Callable[[Kind], S3], monkeypatch: pytest.MonkeyPatch) -> Callable[[Kind], S3]:
    """Leads the environment to a well-behaved S3 server of a kind, with an empty log."""

    def lead(kind: Kind) -> S3:
        s3 = start_s3(kind)
        _lead(monkeypatch, s3.environment)
        s3.spoil()
        s3.requests()
        return s3

    return lead


def _lead(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # as often as always, without the waits
    backoff = {"init_backoff": timedelta(seconds=0.01), "max_backoff": timedelta(seconds=0.05), "base": 2}
    monkeypatch.setitem(objects.RETRIES, "backoff", backoff)


@pytest.fixture(scope="session")
def start_cloud() -> Iterator[Callable[[CloudKind], Cloud]]:
    """Starts a server of Google's or Azure's interface, once per test worker."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda kind: stack.enter_context(running_cloud(kind)))


@pytest.fixture
def new_url(
    start_cloud: Callable[[CloudKind], Cloud], use_s3: Callable[[Kind], S3], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Leads the environment to an object store of any kind; the URL of an empty prefix in it."""

    def lead(kind: str) -> str:
        if kind not in get_args(CloudKind):
            return use_s3(cast(Kind, kind)).new_url()
        cloud = start_cloud(cast(CloudKind, kind))
        _lead(monkeypatch, cloud.environment)
        return cloud.new_url()

    return lead


@pytest.fixture(params=["moto", pytest.param("weed", marks=pytest.mark.slow)])
def s3(request: pytest.FixtureRequest, use_s3: Callable[[Kind], S3]) -> S3:
    """An S3 server to which the environment leads; `s3.spoil(…)` makes it misbehave."""
    return use_s3(request.param)


@pytest.fixture
def bucket(s3: S3) -> str:
    """The URL of an empty prefix in a bucket."""
    return s3.new_url()


@pytest.fixture
def pipeline(database: Database, provider: Provider, tmp_path: Path) -> Pipeline:
    """Database, provider and a storage folder of the test's own; 64 dimensions, ranges of 100 song_ids."""
    return make_pipeline(database, provider, tmp_path / "store")


def make_pipeline(database: Database, provider: Provider, storage: Path | str, **settings: object) -> Pipeline:
    """A pipeline with some settings; a new one is a new run over the same database and store."""
    given: dict[str, object] = {
        "postgres_url": database.url,
        "fireworks_api_key": provider.api_key,
        "fireworks_base_url": provider.base_url,
        "storage": str(storage),
        "embedding_dimensions": 64,
        "requests_per_minute": 1_000_000,
        "tokens_per_minute": 1_000_000_000,
        "range_size": TILING.width,
        "song_id_stop": TILING.stop,
    }
    return Pipeline(Settings(**(given | settings)))


def environment_of(database: Database, provider: Provider, folder: Path) -> dict[str, str]:
    """The variables of somebody who has a database and a key, and keeps the store in a folder; 64 dimensions."""
    return {
        "POSTGRES_URL": database.url,
        "FIREWORKS_API_KEY": provider.api_key,
        "FIREWORKS_BASE_URL": provider.base_url,
        "SONGVEC_STORAGE": str(folder / "store"),
        "SONGVEC_EMBEDDING_DIMENSIONS": "64",
    }
