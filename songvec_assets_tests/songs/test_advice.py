"""A table that cannot be used is refused with what makes it usable: a setting, a right, a view that serves."""

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets.errors import SourceError
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.source import find_source
from songvec_assets_tests.administration import as_role
from songvec_assets_tests.songs.test_source import export, run


def test_a_missing_table_is_named_with_the_variable(database: Database) -> None:
    with pytest.raises(SourceError, match=r"no table tunes .* SONGVEC_SONGS_TABLE, also as schema\.table"):
        find_source(database, PostgresSettings(songs_table="tunes"))


def test_a_table_in_schemas_that_are_not_searched_is_named_with_each(database: Database) -> None:
    for schema in ("catalogue", "archive"):
        run(database, f"CREATE SCHEMA {schema}", f"CREATE TABLE {schema}.songs (id integer PRIMARY KEY)")
    with pytest.raises(SourceError, match=r"set SONGVEC_SONGS_TABLE=archive\.songs or catalogue\.songs$"):
        find_source(database, PostgresSettings())
    with pytest.raises(SourceError, match=r"set SONGVEC_SONGS_TABLE=archive\.songs or catalogue\.songs$"):
        find_source(database, PostgresSettings(songs_table="public.songs"))


def test_each_right_that_lacks_is_named_with_the_statement_that_gives_it(database: Database, tmp_path: Path) -> None:
    run(
        database,
        'CREATE SCHEMA "Their"',
        """CREATE TABLE "Their".songs
           (id integer PRIMARY KEY, name text, artist text, "Lyrics" text, secret text)""",
        """INSERT INTO "Their".songs VALUES (7, 'Sea', 'Ann', 'waves')""",
    )
    names = PostgresSettings(songs_table="Their.songs", lyrics_column="Lyrics")

    def refusal(seen: Database, names: PostgresSettings = names) -> str:
        with pytest.raises(SourceError, match="this user lacks a right") as caught:
            find_source(seen, names)
        return str(caught.value)

    with as_role(database) as seen:
        assert 'run GRANT USAGE ON SCHEMA "Their" TO "role_' in refusal(seen, PostgresSettings())
        statements = refusal(seen).partition("let its owner run ")[2]
        assert re.fullmatch(
            r"""GRANT USAGE ON SCHEMA "Their" TO "\w+"; GRANT SELECT ON "Their"."songs" TO "\w+";""", statements
        )
        role = str(sa.make_url(seen.url).username)
        run(
            database,
            f'GRANT USAGE ON SCHEMA "Their" TO {role}',
            f'GRANT SELECT (id, name, artist) ON "Their".songs TO {role}',
        )
        statement = refusal(seen).partition("let its owner run ")[2]
        assert statement == f"""GRANT SELECT ("Lyrics") ON "Their"."songs" TO "{role}";"""
        run(database, statement)
        assert export(seen, names, tmp_path) == [(7, "Sea", "Ann", "waves")], "rights on the columns do"


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("integer", "303", "303"),
        ("jsonb", """'{"text": "Ann"}'""", "Ann"),
        ("json", """'{"text": "Ann"}'""", "Ann"),
        ("bytea", "'Ann'", "Ann"),
        ("uuid", "'00000000-0000-0000-0000-000000000303'", "00000000-0000-0000-0000-000000000303"),
        ("integer[]", "'{3,4}'", "3, 4"),
        ("numbers", "'{3,4}'", "3, 4"),
    ],
)
@pytest.mark.parametrize("column", ["name", "artist", "lyrics"])
def test_what_is_no_text_is_refused_with_the_view_that_serves(
    database: Database, tmp_path: Path, column: str, kind: str, value: str, text: str
) -> None:
    texts = {"name": "text", "artist": "text", "lyrics": "text"} | {column: kind}
    values = {"name": "'Sea'", "artist": "'Ann'", "lyrics": "'waves'"} | {column: value}
    run(
        database,
        "CREATE DOMAIN numbers AS integer[]",
        f"CREATE TABLE songs (id integer PRIMARY KEY, {', '.join(map(' '.join, texts.items()))}, at date)",
        f"INSERT INTO songs VALUES (7, {', '.join(values.values())}, now())",
    )
    with pytest.raises(SourceError, match=re.escape(f"column {column!r} is {kind}")) as caught:
        find_source(database, PostgresSettings(updated_at_column="at"))
    settings, _, statement = str(caught.value).partition(": CREATE VIEW")
    assert settings.endswith("SONGVEC_SONGS_TABLE=public.songs_as_text SONGVEC_SONG_ID_COLUMN=id")
    run(database, f"CREATE VIEW{statement}")
    (row,) = export(
        database,
        PostgresSettings(songs_table="public.songs_as_text", song_id_column="id", updated_at_column="at"),
        tmp_path,
    )
    expected = {"name": "Sea", "artist": "Ann", "lyrics": "waves"} | {column: text}
    assert row == (7, *expected.values())


def test_a_key_of_another_table_is_refused_with_the_view_that_joins_it(database: Database, tmp_path: Path) -> None:
    run(
        database,
        'CREATE SCHEMA "Their"',
        """CREATE TABLE "Their"."Artists" (code text, "Key" bigint PRIMARY KEY, born date, name text)""",
        """CREATE TABLE songs (id integer PRIMARY KEY, name text, lyrics jsonb,
           "by" bigint REFERENCES "Their"."Artists")""",
        """INSERT INTO "Their"."Artists" VALUES ('x', 303, now(), 'Ann')""",
        """INSERT INTO songs VALUES (7, 'Sea', '{"text": "waves"}', 303), (8, 'Hill', NULL, NULL)""",
    )
    names = PostgresSettings(artist_column="by")
    with pytest.raises(SourceError, match="column 'by' is bigint, column 'lyrics' is jsonb") as caught:
        find_source(database, names)
    run(database, f"CREATE VIEW{str(caught.value).partition(': CREATE VIEW')[2]}")
    view = names.model_copy(update={"songs_table": "public.songs_as_text", "song_id_column": "id"})
    assert export(database, view, tmp_path) == [(7, "Sea", "Ann", "waves"), (8, "Hill", None, None)]
