"""The songs table as people have it: odd names, ids of other types, and what is said where it does not do."""

from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from songvec_assets.cli import app
from songvec_assets.errors import DatabaseError, SourceError, describe
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.search.nearest import read_songs
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.counts import count_ranges, count_unreachable_ids
from songvec_assets.songs.export import ExportOptions, cache_songs_to_parquet
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import HASHES, SONGS, find_source
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.administration import as_role, execute
from songvec_assets_tests.provider import Provider

TILING = Tiling(width=100, stop=1_000)


def run(database: Database, *statements: str) -> None:
    """Run statements as an administrator."""
    for statement in statements:
        execute(database.adbc_uri, statement)


def export(database: Database, names: PostgresSettings, folder: Path) -> list[tuple]:
    """Find the source, export it, and read all that was written."""
    cache_songs_to_parquet(find_source(database, names), Snapshots(LocalStorage(folder)), TILING)
    tables = [Snapshots(LocalStorage(folder)).read(each) for each in Snapshots(LocalStorage(folder)).ranges()]
    return [row for table in tables for row in table.drop("rejected").rows()]


class TestNames:
    def test_quotes_and_capitals_in_names_are_taken_as_written(self, database: Database, tmp_path: Path) -> None:
        run(
            database,
            """
            CREATE TABLE "My ""Songs"";--"
            ("Song Id" integer PRIMARY KEY, "na""me'" text, "Künstler" text, "LYRICS" text)
            """,
            """INSERT INTO "My ""Songs"";--" VALUES (7, 'Sea', 'Ann', 'waves')""",
        )
        names = PostgresSettings(
            songs_table='My "Songs";--',
            name_column="na\"me'",
            artist_column="Künstler",
            lyrics_column="LYRICS",
            song_id_column=None,
        )
        assert find_source(database, names).song_id_column == "Song Id"
        assert export(database, names, tmp_path) == [(7, "Sea", "Ann", "waves")]

    def test_a_percent_sign_in_a_name_is_taken_as_written(self, database: Database, tmp_path: Path) -> None:
        run(
            database,
            'CREATE TABLE "100% songs" ("%id" integer PRIMARY KEY, "%(name)s" text, artist text, lyrics text)',
            """INSERT INTO "100% songs" VALUES (7, 'Sea', 'Ann', 'waves')""",
        )
        names = PostgresSettings(songs_table="100% songs", name_column="%(name)s")
        assert export(database, names, tmp_path) == [(7, "Sea", "Ann", "waves")]
        assert count_unreachable_ids(find_source(database, names)) == Counter()

    @pytest.mark.parametrize(
        "odd", ['My "Songs";--', "100% %s %(name)s", "a:b :name ::text", "it's $1 \\ {x}", "Ünï çødé"]
    )
    def test_schema_table_and_columns_may_have_any_name(self, database: Database, tmp_path: Path, odd: str) -> None:
        quoted = [f'"{each}"' for each in (odd.replace('"', '""') + suffix for suffix in ("", "1", "2", "3", "4", "5"))]
        schema, song_id, name, artist, lyrics, changed = quoted
        run(
            database,
            f"CREATE SCHEMA {schema}",
            f"CREATE TABLE {schema}.{schema} ({song_id} integer PRIMARY KEY, {name} text, {artist} text, "
            f"{lyrics} text, {changed} timestamp)",
            f"INSERT INTO {schema}.{schema} VALUES (7, 'Sea', 'Ann', 'waves', '2026-01-01')",
        )
        columns = {
            f"{column}_column": f"{odd}{place}"
            for place, column in enumerate(("song_id", "name", "artist", "lyrics", "updated_at"), start=1)
        }
        names = PostgresSettings(songs_table=f"{odd}.{odd}", **columns)
        assert export(database, names, tmp_path) == [(7, "Sea", "Ann", "waves")]
        run(database, f"INSERT INTO {schema}.{schema} VALUES (8, 'Hill', 'Ben', NULL, '2026-01-02')")
        assert export(database, names, tmp_path) == [(7, "Sea", "Ann", "waves"), (8, "Hill", "Ben", None)]
        run(database, f"INSERT INTO {schema}.{schema} VALUES (9, 'Moon', 'Cy', NULL, '2026-01-03')")
        cache_songs_to_parquet(
            find_source(database, names), Snapshots(LocalStorage(tmp_path)), TILING, ExportOptions("append")
        )
        assert Snapshots(LocalStorage(tmp_path)).read(SongIdRange(0, 100))["song_id"].to_list() == [7, 8, 9]
        assert count_unreachable_ids(find_source(database, names)) == Counter()

    @pytest.mark.parametrize("schema", ["catalogue", "My Catalogue"])
    def test_a_table_of_another_schema_is_named_with_it(self, database: Database, tmp_path: Path, schema: str) -> None:
        run(
            database,
            f'CREATE SCHEMA "{schema}"',
            f'CREATE TABLE "{schema}".songs (id integer PRIMARY KEY, name text, artist text, lyrics text)',
            f"""INSERT INTO "{schema}".songs VALUES (7, 'Sea', 'Ann', 'waves')""",
        )
        assert export(database, PostgresSettings(songs_table=f"{schema}.songs"), tmp_path) == [
            (7, "Sea", "Ann", "waves")
        ]
        with pytest.raises(SourceError, match="SONGVEC_SONGS_TABLE"):
            find_source(database, PostgresSettings(songs_table="songs"))


class TestMissing:
    @pytest.mark.parametrize(
        ("field", "variable"),
        [
            ("song_id_column", "SONGVEC_SONG_ID_COLUMN"),
            ("name_column", "SONGVEC_NAME_COLUMN"),
            ("artist_column", "SONGVEC_ARTIST_COLUMN"),
            ("lyrics_column", "SONGVEC_LYRICS_COLUMN"),
            ("updated_at_column", "SONGVEC_UPDATED_AT_COLUMN"),
        ],
    )
    def test_a_missing_column_is_named_with_those_there_and_the_variable(
        self, database: Database, field: str, variable: str
    ) -> None:
        run(
            database,
            "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text, old text)",
            "ALTER TABLE songs DROP COLUMN old",
        )
        with pytest.raises(SourceError) as caught:
            find_source(database, PostgresSettings(**{field: "titel"}))
        assert str(caught.value) == (
            f"table songs has no column 'titel'; it has id, name, artist, lyrics: set {variable}"
        )

    @pytest.mark.parametrize("kind", ["text", "integer", "time"])
    def test_an_updated_at_column_that_is_no_time_is_refused(self, database: Database, kind: str) -> None:
        run(database, f"CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text, at {kind})")
        with pytest.raises(SourceError, match=r"SONGVEC_UPDATED_AT_COLUMN 'at' is .* expected a date or timestamp"):
            find_source(database, PostgresSettings(updated_at_column="at"))

    def test_a_table_that_this_user_may_not_read_says_which_right_is_lacking(self, database: Database) -> None:
        run(database, "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
        with as_role(database) as seen, pytest.raises((SourceError, DatabaseError)) as caught:
            count_ranges(find_source(seen, PostgresSettings()), TILING)
        assert "this user lacks a right" in str(caught.value)


class TestIds:
    @pytest.mark.parametrize(
        "definition",
        [
            "(id integer, name text, artist text, lyrics text)",
            "(id integer UNIQUE NOT NULL, name text, artist text, lyrics text)",
            "(id integer, name text, artist text, lyrics text, PRIMARY KEY (id, name))",
        ],
    )
    def test_without_a_single_column_key_the_id_must_be_named(
        self, database: Database, tmp_path: Path, definition: str
    ) -> None:
        run(database, f"CREATE TABLE songs {definition}", "INSERT INTO songs VALUES (7, 'Sea', 'Ann', NULL)")
        with pytest.raises(SourceError, match="name its id with SONGVEC_SONG_ID_COLUMN") as caught:
            find_source(database, PostgresSettings())
        assert ("primary key is (id, name)" if "PRIMARY" in definition else "it has no primary key") in str(
            caught.value
        )
        assert export(database, PostgresSettings(song_id_column="id"), tmp_path) == [(7, "Sea", "Ann", None)]

    @pytest.mark.parametrize("kind", ["text", "uuid", "numeric", "timestamp"])
    def test_an_id_that_is_no_integer_is_refused_and_another_can_be_named(self, database: Database, kind: str) -> None:
        run(database, f"CREATE TABLE songs (id {kind} PRIMARY KEY, name text, artist text, lyrics text, number bigint)")
        with pytest.raises(SourceError, match="SONGVEC_SONG_ID_COLUMN"):
            find_source(database, PostgresSettings())
        with pytest.raises(SourceError, match=rf"'id' of songs is {kind}.*SONGVEC_SONG_ID_COLUMN"):
            find_source(database, PostgresSettings(song_id_column="id"))
        assert find_source(database, PostgresSettings(song_id_column="number")).song_id == '"number"'

    @pytest.mark.parametrize("kind", ["smallint", "integer", "bigint", "smallserial", "serial", "bigserial"])
    def test_every_integer_type_is_an_id(self, database: Database, tmp_path: Path, kind: str) -> None:
        run(
            database,
            f"CREATE TABLE songs (id {kind} PRIMARY KEY, name text, artist text, lyrics text)",
            "INSERT INTO songs SELECT n, 'Sea', 'Ann', NULL FROM unnest(ARRAY[0, 99, 100, 999, 1000, 32767]) n",
        )
        rows = export(database, PostgresSettings(), tmp_path)
        assert [song_id for song_id, *_ in rows] == [0, 99, 100, 999, 1000, 32767]

    @pytest.mark.parametrize("column", ["id", "song_id", "name"])
    @pytest.mark.parametrize("kind", ["integer", "bigint"])
    def test_rows_come_from_the_ids_index_in_order_whatever_the_column_is_called(
        self, database: Database, column: str, kind: str
    ) -> None:
        run(
            database,
            f"CREATE TABLE songs ({column} {kind} PRIMARY KEY, title text, artist text, lyrics text)",
            "INSERT INTO songs SELECT n, 'Sea', 'Ann', repeat('la ', 100) FROM generate_series(0, 9999) n",
            "VACUUM ANALYZE songs",
        )
        source = find_source(database, PostgresSettings(name_column="title"))
        for statement in (source.select(columns, SongIdRange(5_000, 5_100)) for columns in (SONGS, HASHES)):
            plan = [line for (line,) in execute(database.adbc_uri, f"EXPLAIN {statement}")]
            assert any("Index Scan using songs_pkey" in line for line in plan)
            assert not any("Sort" in line for line in plan)


class TestOtherRelations:
    @pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
    def test_a_view_is_a_source_with_a_named_id(self, database: Database, tmp_path: Path, kind: str) -> None:
        run(
            database,
            "CREATE TABLE tracks (key text PRIMARY KEY, number bigint, title varchar(50), by_id integer)",
            "CREATE TABLE artists (by_id integer PRIMARY KEY, artist char(3))",
            "INSERT INTO tracks VALUES ('a', 7, 'Sea', 1)",
            "INSERT INTO artists VALUES (1, 'Ann')",
            f"CREATE {kind} songs AS "
            "SELECT number, title, artist, NULL::text AS lyrics FROM tracks JOIN artists USING (by_id)",
        )
        with pytest.raises(SourceError, match="SONGVEC_SONG_ID_COLUMN"):
            find_source(database, PostgresSettings(name_column="title"))
        names = PostgresSettings(song_id_column="number", name_column="title")
        assert export(database, names, tmp_path) == [(7, "Sea", "Ann", None)]

    def test_a_partitioned_table_is_a_source(self, database: Database, tmp_path: Path) -> None:
        run(
            database,
            "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text) PARTITION BY RANGE (id)",
            "CREATE TABLE songs_a PARTITION OF songs FOR VALUES FROM (0) TO (50)",
            "CREATE TABLE songs_b PARTITION OF songs FOR VALUES FROM (50) TO (500)",
            "INSERT INTO songs VALUES (7, 'Sea', 'Ann', NULL), (70, 'Hill', 'Ben', NULL)",
        )
        assert export(database, PostgresSettings(), tmp_path) == [(7, "Sea", "Ann", None), (70, "Hill", "Ben", None)]


class TestTypes:
    @pytest.mark.parametrize(
        ("kinds", "values", "expected"),
        [
            ("name varchar(9), artist char(3), lyrics name", "'Sea', 'Ann', 'waves'", ("Sea", "Ann", "waves")),
            (
                "name text, artist text[], lyrics text[]",
                "'Sea', '{Drake,Future}', '{\"one line\",another}'",
                ("Sea", "Drake, Future", "one line\nanother"),
            ),
            (
                "name title, artist who, lyrics lines",
                "'Sea', 'Ann', '{a,b}'",
                ("Sea", "Ann", "a\nb"),
            ),
            ("name who[], artist title[], lyrics citext", "'{Ann,Ben}', '{Ann}', 'La'", ("Ann, Ben", "Ann", "La")),
        ],
    )
    def test_what_is_text_is_read_and_arrays_of_it_are_joined(
        self, database: Database, tmp_path: Path, kinds: str, values: str, expected: tuple[str, ...]
    ) -> None:
        run(
            database,
            "CREATE DOMAIN citext AS text",
            "CREATE DOMAIN short AS varchar(20)",
            "CREATE DOMAIN title AS short CHECK (VALUE <> '')",
            "CREATE DOMAIN lines AS text[]",
            "CREATE TYPE who AS ENUM ('Ann', 'Ben')",
            f"CREATE TABLE songs (id integer PRIMARY KEY, {kinds})",
            f"INSERT INTO songs VALUES (7, {values})",
        )
        assert export(database, PostgresSettings(), tmp_path) == [(7, *expected)]
        with database.get_connection() as connection:
            assert read_songs(connection, find_source(database, PostgresSettings()), [7]) == {7: expected}

    def test_a_domain_is_read_as_its_base_type(self, database: Database, tmp_path: Path) -> None:
        run(
            database,
            "CREATE DOMAIN number AS integer CHECK (VALUE > 0)",
            "CREATE DOMAIN song_number AS number",
            "CREATE DOMAIN moment AS timestamptz",
            "CREATE TABLE songs (id song_number PRIMARY KEY, name text, artist text, lyrics text, at moment)",
            "INSERT INTO songs VALUES (7, 'Sea', 'Ann', 'waves', now())",
        )
        names = PostgresSettings(updated_at_column="at")
        for _ in range(2):
            assert export(database, names, tmp_path) == [(7, "Sea", "Ann", "waves")]

    def test_types_are_asked_before_anything_is_paid_for(self, pipeline: Pipeline, provider: Provider) -> None:
        run(
            pipeline.database,
            "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist integer, lyrics text)",
            "INSERT INTO songs VALUES (7, 'Sea', 303, 'waves')",
        )
        with pytest.raises(SourceError, match="column 'artist' is integer"):
            pipeline.export()
        assert not pipeline.store.songs.storage.scan().objects
        assert provider.ledger()["requests"] == 0


class TestToldApart:
    def test_an_empty_source_says_whether_policies_may_hide_songs(
        self, database: Database, provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(
            database,
            "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)",
            "INSERT INTO songs VALUES (7, 'Sea', 'Ann', 'waves')",
            "ALTER TABLE songs ENABLE ROW LEVEL SECURITY",
        )
        monkeypatch.chdir(tmp_path)
        with as_role(database, database_right="CREATE, CONNECT") as seen:
            role = sa.make_url(seen.url).username
            run(database, f"GRANT SELECT ON songs TO {role}", f"GRANT USAGE ON SCHEMA songvec TO {role}")
            run(database, f"GRANT SELECT ON ALL TABLES IN SCHEMA songvec TO {role}")
            for name, value in {
                "POSTGRES_URL": seen.url,
                "FIREWORKS_API_KEY": provider.api_key,
                "SONGVEC_STORAGE": str(tmp_path / "store"),
            }.items():
                monkeypatch.setenv(name, value)
            words = "row security is active on songs for this user: policies may hide songs"
            assert words in " ".join(CliRunner().invoke(app, ["status"]).stdout.split())
            result = CliRunner().invoke(app, ["run"])
            assert describe(result.exception).endswith(f"nothing to do ({words}) [source.empty]")
