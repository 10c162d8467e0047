"""Which table a name means, its key, and whether policies hide its rows."""

import sqlalchemy as sa

from songvec_assets.postgres.engine import Database
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.source import find_source
from songvec_assets_tests.administration import as_role
from songvec_assets_tests.songs.test_source import run


def test_a_table_is_looked_for_as_written_then_in_lower_case(database: Database) -> None:
    run(database, "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
    assert find_source(database, PostgresSettings(songs_table="Songs")).relation == '"public"."songs"'
    run(database, 'CREATE TABLE "Songs" (id integer PRIMARY KEY, name text, artist text, lyrics text)')
    assert find_source(database, PostgresSettings(songs_table="Songs")).relation == '"public"."Songs"'


def test_tables_of_one_name_in_two_schemas_are_not_mixed_up(database: Database) -> None:
    run(
        database,
        "CREATE SCHEMA other",
        "CREATE TABLE other.songs (code text PRIMARY KEY, name text)",
        "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)",
    )
    assert find_source(database, PostgresSettings()).relation == '"public"."songs"'


def test_columns_that_a_key_only_carries_along_are_no_part_of_it(database: Database) -> None:
    run(
        database,
        "CREATE TABLE songs (id integer, name text, artist text, lyrics text, PRIMARY KEY (id) INCLUDE (name))",
    )
    assert find_source(database, PostgresSettings()).song_id_column == "id"


def test_row_security_is_said_where_it_is_active(database: Database) -> None:
    run(
        database,
        "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)",
        "CREATE VIEW all_songs AS SELECT * FROM songs",
        "CREATE VIEW my_songs WITH (security_invoker = on) AS SELECT * FROM songs",
    )

    def cautions(seen: Database) -> list[bool]:
        views = (PostgresSettings(songs_table=view, song_id_column="id") for view in ("all_songs", "my_songs"))
        sources = [find_source(seen, each) for each in (PostgresSettings(), *views)]
        assert all((f"on {each.table} for this user" in each.caution) == each.row_security for each in sources)
        return [each.row_security for each in sources]

    with as_role(database) as seen, as_role(database, "BYPASSRLS") as exempt:
        for each in (seen, exempt):
            role = sa.make_url(each.url).username
            run(database, f"GRANT SELECT ON songs, all_songs, my_songs TO {role}")
        assert cautions(seen) == [False, False, False]
        run(database, "ALTER TABLE songs ENABLE ROW LEVEL SECURITY")
        assert cautions(seen) == [True, False, True], "the owner of all_songs sees all of them"
        assert cautions(exempt) == cautions(database) == [False, False, False]
