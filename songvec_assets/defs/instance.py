"""Which Dagster instance stores the runs of `songvec`, and how they are found in the UI.

The embedded database and its store have a separate instance, `.songvec/dagster`: the demo's runs are not the history of
a database given by URL. Runs on such a database are stored as dagster.yaml in the working folder says, else in
`.dagster`. When to add here: another fact about where runs are stored. Keep out: running them (`cli/run`).
"""

import functools
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from dagster._core.remote_origin import (
    ManagedGrpcPythonEnvCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.storage.event_log.sqlite import sqlite_event_log
from dagster._core.storage.runs.sqlite import sqlite_run_storage
from dagster._core.storage.schedules.sqlite import sqlite_schedule_storage
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

from songvec_assets.errors import SettingsError
from songvec_assets.settings_group import is_set

WORKSPACE = Path(__file__).parents[1] / "workspace.yaml"
"""What `songvec dev` serves; the one in a clone's root is a copy, for Dagster's commands."""
LOCATION, MODULE = "songvec_assets", "songvec_assets.definitions"

EMBEDDED_HOME = Path(".songvec") / "dagster"
URL_HOME = Path(".dagster")
CONFIGURATION = "telemetry:\n  enabled: false\n# no dialog over the first page\nnux:\n  enabled: false\n"


def choose_home() -> Path:
    """The folder for DAGSTER_HOME; created, with a dagster.yaml, if it is one of this package's.

    Raises:
        SettingsError: it cannot be made or written.
    """
    if given := os.environ.get("DAGSTER_HOME"):
        return Path(given)
    if not is_set("POSTGRES_URL"):
        home = EMBEDDED_HOME
    elif Path("dagster.yaml").exists():
        return Path.cwd()
    else:
        home = URL_HOME
    home = home.absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
        configuration = home / "dagster.yaml"
        if not configuration.exists():
            configuration.write_text(CONFIGURATION, encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"cannot write runs to {home}: {error.strerror}. Work in a folder that you may write to, or set "
            "DAGSTER_HOME to one",
            "store.not-writable",
        ) from error
    return home


@contextmanager
def open_instance() -> Iterator[dg.DagsterInstance]:
    """The instance in `choose_home`."""
    os.environ["DAGSTER_HOME"] = str(choose_home())
    with _sharing_engines(), dg.DagsterInstance.get() as instance:
        yield instance


@contextmanager
def _sharing_engines() -> Iterator[None]:
    """Let Dagster's SQLite storage use one engine for each file, and keep its connections open until the end.

    Dagster makes an engine and a connection for each event. A new engine compiles each statement again; and whenever a
    file's last connection closes, SQLite moves its log into the file, and syncs both and their folder. It also imports
    its ninety migrations, several times for each file.
    """
    read_migrations = ScriptDirectory.from_config
    ScriptDirectory.from_config = functools.cache(read_migrations)  # type: ignore[method-assign]
    engines: dict[str, sa.Engine] = {}
    users: tuple[Any, ...] = (sqlite_event_log, sqlite_run_storage, sqlite_schedule_storage)

    def configure(connection: sqlite3.Connection, _: object) -> None:
        # the mode that Dagster sets, too, after it has made the tables. A crash of the machine, not of a process, may
        # cost a run's last events
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("PRAGMA synchronous = NORMAL")

    def share(url: str, **_: object) -> sa.Engine:
        if url not in engines:
            engine = engines[url] = sa.create_engine(url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_SECONDS})
            engine.dispose = lambda *_: None  # type: ignore[method-assign]
            sa.event.listen(engine, "connect", configure)
        return engines[url]

    for each in users:
        each.create_engine = share
    try:
        yield
    finally:
        ScriptDirectory.from_config = read_migrations  # type: ignore[method-assign]
        for each in users:
            each.create_engine = sa.create_engine
        for engine in engines.values():
            sa.Engine.dispose(engine)


def origin_of(job: dg.JobDefinition) -> RemoteJobOrigin:
    """The origin that a code location would give a job: with it, the UI lists a run under its job."""
    target = LoadableTargetOrigin(executable_path=sys.executable, module_name=MODULE, working_directory=str(Path.cwd()))
    location = ManagedGrpcPythonEnvCodeLocationOrigin(target, LOCATION)
    return RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), job.name)
