"""The URLs that are taken, how a database is described, and what is refused without showing a password."""

import contextlib
import traceback
from urllib.parse import quote

import adbc_driver_postgresql.dbapi as adbc
import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError, SettingsError
from songvec_assets.postgres.engine import Database, get_connection, get_engine
from songvec_assets.postgres.urls import parse_url
from songvec_assets.progress import RunContext
from songvec_assets.songs.readers import Readers
from songvec_assets_tests.administration import dispose, free_port
from songvec_assets_tests.postgres.conftest import PASSWORD, TcpServer


class TestUrls:
    @pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
    def test_every_usual_form_of_a_url_connects_through_psycopg2(self, database: Database, scheme: str) -> None:
        url = f"{scheme}://{database.adbc_uri.partition('://')[2]}"
        with get_connection(url) as connection:
            assert connection.dialect.driver == "psycopg2"
            assert connection.scalar(sa.text("SELECT current_database()")) == sa.make_url(database.url).database
        assert Database(url).adbc_uri == database.adbc_uri
        dispose(url)

    @pytest.mark.parametrize(
        "url",
        [
            "mysql://ann:hunter2@host/songs",
            "postgresql+asyncpg://ann:hunter2@host/songs",
            "postgresql+psycopg://ann:hunter2@host/songs",
            "https://ann:hunter2@host/songs",
            "host=db password=hunter2 dbname=songs",
            "ann:hunter2@host/songs",
            "postgresql:ann:hunter2@host/songs",
            "",
        ],
    )
    def test_other_forms_are_refused_with_the_variable_and_without_the_password(self, url: str) -> None:
        with pytest.raises(SettingsError, match="POSTGRES_URL") as caught:
            parse_url(url)
        assert "hunter2" not in str(caught.value)
        with pytest.raises(SettingsError, match="POSTGRES_URL"):
            get_engine(url)

    def test_several_hosts_are_tried_by_every_driver(
        self, tcp_server: TcpServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
        single = sa.make_url(tcp_server.url("guarded", PASSWORD))
        port, database, closed = single.port, single.database, free_port()
        login = f"guarded:{quote(PASSWORD, safe='')}"
        url = f"postgresql://{login}@127.0.0.1:{closed},127.0.0.1:{port}/{database}?target_session_attrs=read-write"
        seen = Database(url)
        assert seen.describe() == f"127.0.0.1:{closed},127.0.0.1:{port}/{database}"
        with seen.get_connection() as connection:
            assert connection.scalar(sa.text("SHOW client_encoding")) == "UTF8"
        assert seen.has_sessions
        with seen.get_autocommit() as connection:
            assert connection.scalar(sa.text("SHOW client_encoding")) == "UTF8"

        def ask(connection: adbc.Connection) -> str:
            with connection.cursor() as cursor:
                cursor.execute("SELECT current_setting('client_encoding')")
                return str(cursor.fetchone()[0])

        with Readers(seen, 1) as readers:
            assert list(readers.map(lambda reader, _: reader.read(ask), [None], RunContext())) == ["UTF8"]
        dispose(url)

    @pytest.mark.parametrize(
        ("url", "described"),
        [
            ("postgresql://ann@[::1]:6543/songs", "::1:6543/songs"),
            ("postgresql://ann@%2Frun%2Fpg/songs", "/run/pg:5432/songs"),
            ("postgresql://ann@/songs?host=a,b&port=1,2", "a:1,b:2/songs"),
            ("postgresql://ann@a,b:6/songs", "a:5432,b:6/songs"),
            ("postgresql://a,b/songs?port=7&user=ann", "a:7,b:7/songs"),
            ("postgresql:///?service=music", "service music"),
            ("postgresql://ann@db", "db:5432/ann"),
        ],
    )
    def test_what_libpq_takes_is_taken(self, url: str, described: str) -> None:
        assert Database(url).describe() == described

    @pytest.mark.parametrize(
        ("query", "words"),
        [
            ("pgbouncer=true", "pgbouncer is Prisma's: leave it out"),
            ("schema=music&sslmode=require", "schema is Prisma's: write options=-csearch_path%3D"),
            ("sslmode=require&currentSchema=music&prepareThreshold=0", "prepareThreshold is JDBC's: leave it out"),
            ("statement_cache_size=0", "asyncpg's"),
            ("unheard_of=1", "options of libpq only"),
        ],
    )
    def test_options_of_other_tools_are_named_with_what_to_write(self, query: str, words: str) -> None:
        with pytest.raises(SettingsError, match="POSTGRES_URL") as refused:
            get_engine(f"postgresql://ann:{PASSWORD}@db/songs?{query}")
        assert words in str(refused.value)
        assert PASSWORD not in "".join(traceback.format_exception(refused.value))

    @pytest.mark.parametrize("password", ["hunter2/x", "hunter2%zz", "9/hunter2", "a:b/hunter2"])
    def test_what_is_not_encoded_in_a_password_is_refused_and_shown_nowhere(self, password: str) -> None:
        with pytest.raises(SettingsError, match="POSTGRES_URL") as refused:
            parse_url(f"postgresql://ann:{password}@db/songs")
        assert "hunter2" not in "".join(traceback.format_exception(refused.value))

    def test_a_port_that_is_no_number_is_refused_with_the_variable(self) -> None:
        with pytest.raises(SettingsError, match="POSTGRES_URL"):
            get_engine("postgresql://ann:hunter2@host:54x2/songs")

    def test_an_at_sign_left_unencoded_in_the_password_is_refused_and_shown_nowhere(self) -> None:
        url = "postgresql://ann:half@hunter2@127.0.0.1:1/songs"
        shown = repr(Database(url))
        with contextlib.suppress(SettingsError):
            shown += Database(url).describe()
        with pytest.raises((SettingsError, DatabaseError)) as caught, get_connection(url):
            pass
        shown += "".join(traceback.format_exception(caught.value))
        assert "hunter2" not in shown
        assert isinstance(caught.value, SettingsError)
        assert "percent-encode" in str(caught.value)

    def test_a_database_is_described_by_host_port_and_name(self) -> None:
        assert Database("postgres://ann:hunter2@db.example:6543/songs").describe() == "db.example:6543/songs"
        assert Database("postgresql://ann:hunter2@db.example/songs").describe() == "db.example:5432/songs"
        assert Database("postgresql://ann@/songs?host=/run/pg").describe() == "/run/pg:5432/songs"
        assert Database("postgresql://ann@/songs", embedded=True).describe() == "embedded Postgres"
