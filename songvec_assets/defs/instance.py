"""Which Dagster instance stores the runs of `songvec`, and how they are found in the UI.

The embedded database and its store have a separate instance, `.songvec/dagster`: the demo's runs are not the history of
a database given by URL. Runs on such a database are stored as dagster.yaml in the working folder says, else in
`.dagster`. When to add here: another fact about where runs are stored. Keep out: running them (`cli/run`).
"""

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import dagster as dg
from dagster._core.remote_origin import (
    ManagedGrpcPythonEnvCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.storage.event_log import SqliteEventLogStorage
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
    with dg.DagsterInstance.get() as instance:
        yield instance


@contextmanager
def holding_files_open(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Keep the instance's SQLite files, if it has any, open for the events of a run that is to be created.

    Dagster opens a connection for each event. Whenever a file's last connection closes, SQLite moves its log into the
    file, and syncs both and their folder: five syncs per event. Each event is synced to the log in any case.
    """
    storage = instance.event_log_storage
    with ExitStack() as opened:
        if isinstance(storage, SqliteEventLogStorage):
            index, events = (Path(storage.path_for_shard(name)) for name in ("index", run_id))
            for path in (index, events, index.parents[1] / "runs.db"):
                connection = opened.enter_context(closing(sqlite3.connect(path)))
                # the mode that Dagster sets, too, after it has made the tables; then a read, which opens the log
                connection.execute("PRAGMA journal_mode = WAL").fetchall()
                connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        yield


def origin_of(job: dg.JobDefinition) -> RemoteJobOrigin:
    """The origin that a code location would give a job: with it, the UI lists a run under its job."""
    target = LoadableTargetOrigin(executable_path=sys.executable, module_name=MODULE, working_directory=str(Path.cwd()))
    location = ManagedGrpcPythonEnvCodeLocationOrigin(target, LOCATION)
    return RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), job.name)
