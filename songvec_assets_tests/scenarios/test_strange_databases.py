"""Databases of other people: ids, encodings and addresses that no sample has. Scenarios over all rooms, by commands."""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets import cli
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import PostgresSettings, variables
from songvec_assets.songs.source import find_source
from songvec_assets.songs.watch import digest_source
from songvec_assets_tests.administration import dispose, execute, own_engine, wait_until, with_parts
from songvec_assets_tests.conftest import environment_of
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.warm import start as start_warm

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str]]

FIRST_ID = 1_500_000_000


def settings_of(database: Database, provider: Provider, folder: Path) -> dict[str, str]:
    return environment_of(database, provider, folder) | {"DAGSTER_HOME": str(folder), "COLUMNS": "500"}


def count_paid(provider: Provider) -> int:
    """Texts of songs that were billed."""
    return sum(count for text, count in provider.texts().items() if " by " in text)


@pytest.fixture
def command(
    database: Database,
    provider: Provider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Types a command in this process: exit code and output."""

    def type_in(*words: str, **settings: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            for name, value in (settings_of(database, provider, tmp_path) | settings).items():
                patch.setenv(name, value)
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", ["songvec", *words])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        said = capsys.readouterr()
        # a line may have been wrapped
        return int(ended.value.code or 0), " ".join((said.out + said.err).split())

    return type_in


def fork(folder: Path, settings: Mapping[str, str], *words: str) -> tuple[int, str]:
    """Type a command in a process of its own: settings that shape the graph are read when it loads."""
    kept = {name: value for name, value in os.environ.items() if name not in variables()}
    code = "from songvec_assets.cli import main; main()"
    process = start_warm(["-c", code, *words], folder, kept | settings)
    output, _ = process.communicate(timeout=150)
    return int(process.returncode or 0), output


class TestIds:
    def create(self, database: Database, kind: str, id_of: str, n_songs: int) -> None:
        execute(
            database.adbc_uri,
            f"""
            CREATE TABLE songs (id {kind} PRIMARY KEY, name text, artist text, lyrics text);
            INSERT INTO songs SELECT {id_of}, 'Song ' || n, 'Ann', 'la la ' || n
            FROM generate_series(0, {n_songs - 1}) n
            """,
        )

    def test_ids_from_one_and_a_half_billion_are_embedded_loaded_and_found(
        self, database: Database, provider: Provider, tmp_path: Path
    ) -> None:
        self.create(database, "integer", f"{FIRST_ID} + 25000 * n", 40)
        settings = settings_of(database, provider, tmp_path)
        high = {"SONGVEC_SONG_ID_STOP": "2147483648", "SONGVEC_SONG_ID_START": str(FIRST_ID)}
        code, output = fork(tmp_path, settings | high, "run")
        assert code == 1, output
        assert "SONGVEC_RANGE_SIZE=200000 SONGVEC_SONG_ID_START=1500000000 SONGVEC_SONG_ID_STOP=2147483648" in output
        assert not (tmp_path / "store").exists()
        high["SONGVEC_RANGE_SIZE"] = "200000"
        code, output = fork(tmp_path, settings | high, "run")
        assert code == 0, output
        assert count_paid(provider) == 40
        assert execute(database.adbc_uri, "SELECT count(*), min(song_id), max(song_id) FROM song_embeddings") == [
            (40, FIRST_ID, FIRST_ID + 39 * 25_000)
        ]
        code, output = fork(tmp_path, settings | high, "status")
        assert code == 0, output
        assert "1500000000-1500200000" in output
        code, output = fork(tmp_path, settings | high, "search", "whales", "-n", "1")
        assert code == 0, output
        assert "la la" in output, output
        # a song below the first range is refused by the setting, before a request
        execute(database.adbc_uri, f"INSERT INTO songs VALUES ({FIRST_ID - 1}, 'Low', 'Ann', 'la')")
        for words in (("run",), ("run", "--dry-run")):
            code, output = fork(tmp_path, settings | high, *words)
            assert code == 1, output
            assert "SONGVEC_SONG_ID_START" in output
            assert "set it to 1499800000 or less" in output
        code, output = fork(tmp_path, settings | high | {"SONGVEC_SONG_ID_START": "1499800000"}, "run")
        assert code == 0, output
        assert provider.texts()["Low by Ann\nla"] == 1
        assert count_paid(provider) == 41
        # what is cached is never left out
        execute(database.adbc_uri, f"DELETE FROM songs WHERE id < {FIRST_ID}")
        code, output = fork(tmp_path, settings | high, "run")
        assert code == 1, output
        assert "holds songs from song_id 1499800000 on, SONGVEC_SONG_ID_START is 1500000000" in output

    @pytest.mark.parametrize(
        ("kind", "id_of", "named"),
        [
            ("bigint", "3000000000 + n", "above 2147483647"),
            ("uuid", "md5(n::text)::uuid", "is uuid"),
            ("text", "'song-' || n", "is text"),
            ("numeric", "n", "is numeric"),
        ],
    )
    def test_ids_that_are_no_integer_are_refused_with_statements_that_serve(
        self,
        command: Command,
        database: Database,
        provider: Provider,
        tmp_path: Path,
        kind: str,
        id_of: str,
        named: str,
    ) -> None:
        self.create(database, kind, id_of, 30)
        code, output = command("run")
        assert code == 1, output
        assert named in output, output
        assert not (tmp_path / "store").exists()
        assert provider.ledger()["requests"] == 0
        statements = re.search(r"CREATE TABLE .*;(?= set SONGVEC)", output)
        assert statements, output
        execute(database.adbc_uri, statements.group())
        settings = dict(re.findall(r"(SONGVEC_SONGS_TABLE|SONGVEC_SONG_ID_COLUMN)=([^\s,]+)", output))
        code, output = command("run", **settings)
        assert code == 0, output
        assert execute(database.adbc_uri, "SELECT count(*) FROM song_embeddings") == [(30,)]
        # the numbers stay where they are when songs come
        execute(database.adbc_uri, f"INSERT INTO songs SELECT {id_of}, 'New', 'Ann', 'new' FROM (VALUES (-1)) v (n)")
        execute(database.adbc_uri, re.search(r"INSERT INTO [^;]*;", statements.group()).group())  # type: ignore[union-attr]
        code, output = command("run", **settings)
        assert code == 0, output
        assert count_paid(provider) == 31

    def test_a_few_ids_beyond_are_rejected_and_the_others_embedded(self, command: Command, database: Database) -> None:
        self.create(database, "bigint", "CASE WHEN n = 0 THEN 3000000000 ELSE n END", 30)
        code, output = command("run")
        assert code == 0, output
        assert execute(database.adbc_uri, "SELECT count(*) FROM song_embeddings") == [(29,)]
        code, output = command("status")
        assert "1 × the id is above 2147483647" in output, output


class TestEncodings:
    """Of databases whose encoding is not UTF-8, or whose bytes are not what they are declared."""

    @pytest.fixture
    def create(self, server_url: str) -> Iterator[Callable[[str], Database]]:
        """Makes a database in an encoding, with the extension and an empty table of songs."""
        with contextlib.ExitStack() as stack:

            def make(encoding: str) -> Database:
                name = f"{encoding.lower()}_songs"
                execute(
                    server_url,
                    f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'",
                )
                made = Database(with_parts(server_url, database=name))
                stack.callback(execute, server_url, f"DROP DATABASE {name} WITH (FORCE)")
                stack.callback(dispose, made.url)
                execute(
                    made.adbc_uri,
                    "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text);"
                    "INSERT INTO songs SELECT n, 'Song ' || n, 'Ann', 'la la ' || n FROM generate_series(1, 30) n",
                )
                return made

            yield make

    @pytest.mark.parametrize(("encoding", "word"), [("LATIN1", "Zoë"), ("EUC_JP", "海の歌"), ("WIN1252", "“Straße”")])
    def test_the_server_converts_what_it_can(
        self,
        create: Callable[[str], Database],
        command: Command,
        provider: Provider,
        monkeypatch: pytest.MonkeyPatch,
        encoding: str,
        word: str,
    ) -> None:
        database = create(encoding)
        monkeypatch.setenv("PGCLIENTENCODING", "UTF8")
        execute(
            database.adbc_uri,
            "UPDATE songs SET name = %s, lyrics = %s WHERE id = 7",
            (word, word),
        )
        settings = {"POSTGRES_URL": database.url, "PGCLIENTENCODING": "LATIN1"}
        code, output = command("run", **settings)
        assert code == 0, output
        assert provider.texts()[f"{word} by Ann\n{word}"] == 1
        code, output = command("search", "x", "-n", "30", **settings)
        assert code == 0, output
        assert word in output

    @pytest.mark.parametrize(
        ("encoding", "stored", "shown", "named"),
        [
            ("SQL_ASCII", rb"Caf\351", "Caf�", "not valid UTF-8"),
            # LATIN1 itself has no undefined byte; in WIN1252 the server converts all but a few
            ("WIN1252", rb"Caf\201", "Caf�", "not valid CP1252"),
        ],
    )
    @pytest.mark.parametrize("column", ["name", "lyrics"])
    def test_a_row_that_cannot_be_decoded_is_rejected_and_its_neighbours_are_embedded(
        self,
        create: Callable[[str], Database],
        command: Command,
        provider: Provider,
        encoding: str,
        stored: bytes,
        shown: str,
        named: str,
        column: str,
    ) -> None:
        database = create(encoding)
        settings = {"POSTGRES_URL": database.url}
        assert command("run", **settings)[0] == 0
        assert count_paid(provider) == 30
        execute(
            database.adbc_uri,
            f"INSERT INTO songs SELECT n, 'New', 'Ann', 'new ' || n FROM generate_series(31, 33) n; UPDATE songs SET "
            f"{column} = convert_from('{stored.decode()}'::bytea, getdatabaseencoding()) WHERE id IN (7, 32)",
        )
        code, output = command("run", **settings)
        assert code == 0, output
        assert count_paid(provider) == 32
        code, output = command("status", **settings)
        assert code == 0, output
        assert f"song 7: the song's {column} is {named}" in output, output
        assert f"song 32: the song's {column} is {named}" in output, output
        # a search finds the row of song 7 until the next load, and shows what it can
        execute(database.adbc_uri, f"UPDATE songs SET {column} = convert_from('{stored.decode()}'::bytea, "
                "getdatabaseencoding()) WHERE id = 8")  # fmt: skip
        code, output = command("search", "x", "-n", "40", **settings)
        assert code == 0, output
        assert shown in output, output
        with database.get_connection() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM song_embeddings WHERE song_id IN (7, 32)")) == 0
        assert digest_source(find_source(database, PostgresSettings()))


class TestRoles:
    """What a host sets for a role or a database, or puts before it."""

    def test_an_extension_outside_the_search_path_is_refused_before_payment_with_the_statement_that_helps(
        self, command: Command, database: Database, songs: Callable[..., None], provider: Provider
    ) -> None:
        songs(*((n, f"Song {n}", "Ann", "la") for n in range(1, 31)))
        assert command("run")[0] == 0
        before = provider.ledger()["requests"]
        execute(database.adbc_uri, 'CREATE SCHEMA "My Ext"; ALTER EXTENSION vector SET SCHEMA "My Ext"')
        for words in (("run",), ("search", "sea"), ("swap", "--dimensions", "32")):
            code, output = command(*words)
            assert code == 1, output
            statement = re.search(r"ALTER ROLE .*?(?=; and let)", output)
            assert statement, output
        assert provider.ledger()["requests"] == before
        execute(database.adbc_uri, statement.group())  # type: ignore[union-attr]
        try:
            dispose(database.url)
            code, output = command("search", "sea")
            assert code == 0, output
        finally:
            name = sa.make_url(database.url).database
            execute(database.adbc_uri, f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET search_path")

    def test_a_server_that_quotes_all_names_is_served(self, command: Command, database: Database) -> None:
        execute(
            database.adbc_uri,
            "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist varchar(9), lyrics text, at date); "
            "INSERT INTO songs SELECT n, 'Song ' || n, 'Ann', 'la', '2026-01-01' FROM generate_series(1, 30) n",
        )
        name = sa.make_url(database.url).database
        execute(database.adbc_uri, f"ALTER DATABASE {name} SET quote_all_identifiers = on")
        for words in (("run",), ("search", "sea"), ("run",), ("status",)):
            code, output = command(*words, SONGVEC_UPDATED_AT_COLUMN="at")
            assert code == 0, output
        with database.get_connection() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM song_embeddings")) == 30

    def test_timeouts_made_for_queries_do_not_end_a_run_that_waits_its_turn(
        self, command: Command, database: Database, songs: Callable[..., None], provider: Provider
    ) -> None:
        songs(*((n, f"Song {n}", "Ann", "la") for n in range(1, 31)))
        name = sa.make_url(database.url).database
        for timeout in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
            execute(database.adbc_uri, f"ALTER DATABASE {name} SET {timeout} = '100ms'")
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = ANY ('{%s}'::regclass[])"
        waiting %= "songvec.budgets,songvec.rate_limits"

        def hold() -> None:
            """As another process's request does, which has a slow disk."""
            with own_engine(database).connect() as connection:
                connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
                connection.execute(sa.text("LOCK TABLE songvec.budgets, songvec.rate_limits IN EXCLUSIVE MODE"))
                held.set()
                wait_until(lambda: execute(database.adbc_uri, waiting) != [(0,)])
                time.sleep(0.3)

        held = threading.Event()
        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(60)
        code, output = command("run")
        holder.join()
        assert code == 0, output
        assert count_paid(provider) == 30

    def test_a_database_that_takes_no_writes_is_refused_before_payment(
        self, command: Command, database: Database, songs: Callable[..., None], provider: Provider
    ) -> None:
        songs((1, "Sea", "Ann", "la"))
        execute(
            database.adbc_uri,
            f"ALTER DATABASE {sa.make_url(database.url).database} SET default_transaction_read_only = on",
        )
        code, output = command("run")
        assert code == 1, output
        assert "default_transaction_read_only" in output
        assert provider.ledger()["requests"] == 0

    def test_a_pooler_with_two_sessions_is_enough_for_every_command(
        self, command: Command, database: Database, songs: Callable[..., None], provider: Provider
    ) -> None:
        songs(*((n, f"Song {n}", "Ann", f"la {n}") for n in range(1, 61)))
        # a session that is not there in time is an error at once
        with running_pgbouncer(database.url, pool_size=2, query_wait_timeout=5) as url:
            try:
                for words in (("run",), ("search", "sea"), ("swap", "--dimensions", "32"), ("verify",)):
                    settings = {"POSTGRES_URL": url}
                    if words == ("verify",):
                        settings["SONGVEC_EMBEDDING_DIMENSIONS"] = "32"
                    code, output = command(*words, **settings)
                    assert code == 0, output
            finally:
                dispose(url)
        assert count_paid(provider) == 120


class TestTypes:
    def test_a_query_of_bytes_that_are_no_text_is_refused_and_one_with_nul_is_answered(
        self, command: Command, songs: Callable[..., None], provider: Provider
    ) -> None:
        songs((1, "Sea", "Ann", "la"), (2, "Rain", "Bo", "lu"))
        # a server may repeat a text with NUL in it: Postgres takes none, in a text or in JSON
        refusal = {"error": {"message": "bad\0text", "code": "a\0b"}}
        provider.control(poison=["Rain"], statuses=[{"status": 400, "count": 1, "body": refusal}])
        code, output = command("run")
        assert code == 0, output
        code, output = command("search", "a\0b")
        assert code == 0, output
        code, output = command("search", "caf\udce9")
        assert (code, "the query is not valid UTF-8" in output) == (1, True), output

    def test_lyrics_in_json_are_refused_with_a_view_that_reads_strings_lists_and_objects(
        self, command: Command, database: Database, provider: Provider
    ) -> None:
        execute(
            database.adbc_uri,
            """
            CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text[], lyrics jsonb, tags uuid[]);
            INSERT INTO songs VALUES
                (1, 'Sea', '{Ann,Bo}', '"la"', ARRAY[gen_random_uuid()]), (2, 'Rain', '{Ann}', '["la", "lu"]', NULL),
                (3, 'Hill', '{Ann}', '{"text": "lo"}', '{}'), (4, 'Star', '{Ann}', 'null', '{}')
            """,
        )
        code, output = command("run")
        assert code == 1, output
        assert "column 'lyrics' is jsonb" in output
        assert provider.ledger()["requests"] == 0
        execute(database.adbc_uri, re.search(r"CREATE VIEW .*?;", output).group())  # type: ignore[union-attr]
        settings = dict(re.findall(r"(SONGVEC_SONGS_TABLE|SONGVEC_SONG_ID_COLUMN)=([\w.]+)", output))
        code, output = command("run", **settings)
        assert code == 0, output
        assert [text for text in provider.texts() if " by " in text] == [
            "Sea by Ann, Bo\nla", "Rain by Ann\nla\nlu", "Hill by Ann\nlo", "Star by Ann",
        ]  # fmt: skip


class TestVersions:
    def test_a_host_s_version_of_pgvector_runs_and_is_named_once_a_run(
        self, command: Command, database: Database, songs: Callable[..., None]
    ) -> None:
        songs((1, "Sea", "Ann", "la"), (2, "Rain", "Bo", "lu"))
        version = execute(database.adbc_uri, "SELECT extversion FROM pg_extension WHERE extname = 'vector'")[0][0]
        execute(database.adbc_uri, "UPDATE pg_extension SET extversion = '0.8.0.google-4' WHERE extname = 'vector'")
        try:
            code, output = command("run")
            assert code == 0, output
            assert output.count("pgvector 0.8.0.google-4 has errors that were fixed since") == 1, output
            code, output = command("status")
            assert code == 0, output
            assert "Server: pgvector 0.8.0.google-4" in output
            code, output = command("search", "sea")
            assert (code, "fixed since" in output) == (0, False), output
        finally:
            execute(database.adbc_uri, "UPDATE pg_extension SET extversion = %s WHERE extname = 'vector'", (version,))
        code, output = command("run")
        assert "fixed since" not in output


class TestBoilerplate:
    def test_what_is_no_lyric_is_named_before_payment_with_a_view_that_serves(
        self, command: Command, database: Database, songs: Callable[..., None], provider: Provider
    ) -> None:
        credit = "Brought to you by the best lyrics site"
        songs(
            *((n, f"Song {n}", "Ann", f"[ti:Song]\n[00:12.34]la la {n}\n[01:15.2] lu lu") for n in range(1, 11)),
            *((n, f"Song {n}", "Bo", f"12 ContributorsSong {n} Lyrics[Chorus]\nla {n}You might also like\nlu5Embed")
              for n in range(11, 21)),
            *((n, f"Song {n}", "Cy", "[Instrumental]") for n in range(21, 26)),
            *((n, f"Song {n}", "Di", f"[Chorus]\nla la {n}\n{credit}") for n in range(26, 51)),
        )  # fmt: skip
        before = provider.ledger()["requests"]
        for words in (("run", "--dry-run"), ("estimate",)):
            code, output = command(*words)
            assert code == 0, output
            assert "50 of 50 sampled songs (100%)" in output, output
            for named in ("LRC time stamps in 10", "“Embed” of Genius at the end in 10", "“Instrumental” in 5", credit):
                assert named in output
            assert "Chorus" not in output
        assert provider.ledger()["requests"] == before
        view = re.search(r"CREATE VIEW .*?;(?= then set)", output)
        assert view, output
        execute(database.adbc_uri, view.group())
        settings = dict(re.findall(r"(SONGVEC_SONGS_TABLE|SONGVEC_SONG_ID_COLUMN)=([\w.]+)", output))
        code, output = command("run", **settings)
        assert code == 0, output
        assert "no lyric" not in output
        texts = provider.texts()
        assert texts["Song 1 by Ann\nla la 1\nlu lu"] == 1
        assert texts["Song 11 by Bo\n[Chorus]\nla 11\nlu"] == 1
        assert texts["Song 21 by Cy"] == 1
        assert texts["Song 26 by Di\n[Chorus]\nla la 26"] == 1
