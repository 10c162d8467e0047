"""Words that are spelled like those asked for, with pg_trgm: the embedded server lacks it, a Debian package has it."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest

from songvec_assets_tests.administration import execute, free_port
from songvec_assets_tests.servers import Server

SOURCE = {"songs": "public.songs", "song_id": "id", "name": "name", "artist": "artist", "columns": ["artist"]}
SONGS = """
    CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text);
    INSERT INTO songs VALUES
        (1, 'Whale Song', 'Ann'), (2, 'The Whale', 'Ben'), (3, 'Jóga', 'Björk'), (4, 'Hill', NULL),
        (5, 'A Whale Song of the Sea', 'Di'), (6, 'Song of the Whale', 'Ed')
"""

Match = Callable[..., list[int] | None]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with pg_trgm, and the functions of a search by words, which need no vectors."""
    control = next(Path("/usr/share/postgresql").glob("*/extension/pg_trgm.control"), None)
    if control is None:
        pytest.skip("pg_trgm is not installed (Debian's package is postgresql-contrib)")
    binaries = Path("/usr/lib/postgresql") / control.parts[4] / "bin"
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="songvec-spelling-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "pg"
        folder.mkdir()
        if user:
            shutil.chown(folder, user)
        initdb = [
            str(binaries / "initdb"),
            "-D",
            str(folder),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        subprocess.run(initdb, user=user, cwd="/", capture_output=True, check=True)
        server = Server(folder, free_port(), binaries, user)
        server.start()
        try:
            sql = (resources.files("songvec_assets.postgres") / "migrations" / "0002_search.sql").read_text()
            words = sql[sql.index("-- A text without accents") : sql.index("-- The songs nearest to a vec")]
            execute(server.url(), f"CREATE SCHEMA songvec; {words}")
            execute(server.url(), SONGS)
            yield server.url()
        finally:
            server.kill(everything=True)


@pytest.fixture
def match(url: str) -> Match:
    """The songs that match words, best first."""

    def ask(words: str, filter: list[list[str]] | None = None) -> list[int] | None:
        values = (words, json.dumps(filter or []), json.dumps(SOURCE))
        [(found,)] = execute(url, "SELECT songvec.match(%s, 50, %s, %s)", values)
        return found

    return ask


@pytest.mark.slow
def test_accents_do_not_count(match: Match) -> None:
    assert match("joga bjork") == match("JÓGA") == match("Jóga Björk") == [3]
    assert match("hïll") == [4]


@pytest.mark.slow
def test_a_typo_finds_what_the_words_would_and_the_exact_name_comes_first(url: str, match: Match) -> None:
    assert match("whale song") == [1, 5, 6]
    assert match("wale song") is None
    execute(url, "CREATE SCHEMA ext; CREATE EXTENSION pg_trgm SCHEMA ext")
    assert match("whale song") == [1, 5, 6]
    assert match("wale song") == match("Whale Sonk") == [1, 5]
    assert match("wale song", [["artist", "=", "Di"]]) == [5]
    # one word is compared with whole words
    assert match("Hil") == [4]
    assert match("whales") == [2, 1, 6, 5]
    assert match("wha") is None
    assert match("songs about the sea at night and storms") is None
    # of many songs, words alone are compared until an index of spellings is there
    execute(url, "INSERT INTO songs SELECT n, md5(n::text), 'x' FROM generate_series(10, 60000) n; ANALYZE songs")
    execute(url, "CREATE INDEX ON songs USING gin (to_tsvector('simple', songvec.title(name, artist)))")
    assert (match("whale song"), match("wale song")) == ([1, 5, 6], None)
    execute(url, "CREATE INDEX ON songs USING gin (songvec.title(name, artist) ext.gin_trgm_ops)")
    assert (match("whale song"), match("wale song")) == ([1, 5, 6], [1, 5])
