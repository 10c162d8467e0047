"""Any change of a text or an id is seen, and nothing else."""

from dataclasses import replace

import pytest

from songvec_assets.postgres.engine import Database
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.counts import IdSums
from songvec_assets.songs.source import find_source
from songvec_assets.songs.watch import Digest, SourceLook, SourceState, look_at_source, measure_source
from songvec_assets_tests.administration import execute

SONGS = "(id integer PRIMARY KEY, name text, artist text, lyrics text, plays integer DEFAULT 0, at timestamptz)"
SONGS_BIG = "CREATE TABLE songs (id bigint PRIMARY KEY, name text, artist text, lyrics text)"
ROWS = "(1, 'Sea', 'Ann', 'waves'), (2, 'Hill', 'Ben', 'stones')"
QUIET = "rows were written, but no song's text or id changed"


@pytest.fixture(autouse=True)
def _without_rest(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Looks in tests follow each other at once."""
    if "database" in request.fixturenames:
        monkeypatch.setattr("songvec_assets.songs.watch._DIGEST_REST", 0)


def create(database: Database, kind: str) -> PostgresSettings:
    """Two songs in a source of some kind; statements on `songs` change what it shows."""
    statements = {
        "table": f"CREATE TABLE songs {SONGS}",
        "partitioned": f"CREATE TABLE songs {SONGS} PARTITION BY RANGE (id); "
        "CREATE TABLE songs_a PARTITION OF songs FOR VALUES FROM (0) TO (2); "
        "CREATE TABLE songs_b PARTITION OF songs FOR VALUES FROM (2) TO (100)",
        "inherited": f"CREATE TABLE songs {SONGS}; CREATE TABLE others () INHERITS (songs)",
        "view": f"CREATE TABLE songs {SONGS}; CREATE VIEW seen AS SELECT * FROM songs",
    }
    execute(database.adbc_uri, statements[kind])
    execute(database.adbc_uri, f"INSERT INTO {'others' if kind == 'inherited' else 'songs'} VALUES {ROWS}")
    return PostgresSettings(songs_table="seen", song_id_column="id") if kind == "view" else PostgresSettings()


def look(database: Database, names: PostgresSettings, cursor: str | None) -> tuple[str, str | None]:
    """A look's cursor, and why it is quiet. The server counts what a session wrote when that ends."""
    execute(database.adbc_uri, "SELECT pg_stat_force_next_flush()")
    found = look_at_source(find_source(database, names), cursor)
    return found.look.dump(), None if found.changed else found.note


@pytest.mark.parametrize("kind", ["table", "partitioned", "inherited", "view"])
def test_any_change_of_a_text_or_an_id_is_seen(database: Database, kind: str) -> None:
    names = create(database, kind)
    cursor, quiet = look(database, names, None)
    assert quiet is None, "the first look reports"
    for statement in (
        "UPDATE songs SET lyrics = 'other words' WHERE id = 1",
        "UPDATE songs SET lyrics = '' WHERE id = 1",
        "UPDATE songs SET lyrics = NULL WHERE id = 1",
        "UPDATE songs SET name = 'Se', artist = 'aAnn' WHERE id = 1",
        "UPDATE songs SET lyrics = CASE id WHEN 1 THEN 'stones' END, name = 'same', artist = 'same'",
        "UPDATE songs SET lyrics = CASE id WHEN 2 THEN 'stones' END",
        "UPDATE songs SET id = CASE id WHEN 1 THEN 0 ELSE 2 END",
        "INSERT INTO songs VALUES (3, 'New', 'Ann', 'la')",
        "DELETE FROM songs WHERE id = 0",
        "TRUNCATE songs",
    ):
        cursor, quiet = look(database, names, cursor)
        assert quiet in {"nothing changed", QUIET}, statement
        execute(database.adbc_uri, statement)
        cursor, quiet = look(database, names, cursor)
        assert quiet is None, statement


@pytest.mark.parametrize("updated_at", [None, "at"])
@pytest.mark.parametrize("kind", ["table", "partitioned"])
def test_writes_that_change_no_text_start_nothing(database: Database, kind: str, updated_at: str | None) -> None:
    names = create(database, kind).model_copy(update={"updated_at_column": updated_at})
    cursor, _ = look(database, names, None)
    for statement, expected in (
        ("UPDATE songs SET plays = plays + 1", QUIET),
        ("UPDATE songs SET plays = plays + 1, at = now()", QUIET),
        ("UPDATE songs SET lyrics = lyrics", QUIET),
        ("DELETE FROM songs WHERE id = 2; INSERT INTO songs VALUES (2, 'Hill', 'Ben', 'stones')", QUIET),
        ("ALTER TABLE songs ADD COLUMN more text DEFAULT 'x'", "nothing changed"),
    ):
        execute(database.adbc_uri, statement)
        cursor, quiet = look(database, names, cursor)
        assert quiet == expected, statement
        assert look(database, names, cursor) == (cursor, "nothing changed")
    execute(database.adbc_uri, "UPDATE songs SET lyrics = 'new' WHERE id = 1")
    assert look(database, names, cursor)[1] is None


def test_a_materialized_view_is_seen_when_it_is_refreshed(database: Database) -> None:
    create(database, "table")
    execute(database.adbc_uri, "CREATE MATERIALIZED VIEW seen AS SELECT * FROM songs")
    names = PostgresSettings(songs_table="seen", song_id_column="id")
    cursor, _ = look(database, names, None)
    execute(database.adbc_uri, "UPDATE songs SET lyrics = 'new' WHERE id = 1")
    cursor, quiet = look(database, names, cursor)
    assert quiet is not None
    execute(database.adbc_uri, "REFRESH MATERIALIZED VIEW seen")
    assert look(database, names, cursor)[1] is None


def test_counters_that_begin_at_zero_again_are_looked_into(database: Database) -> None:
    names = create(database, "table")
    cursor, _ = look(database, names, None)
    execute(database.adbc_uri, "SELECT pg_stat_reset()")
    cursor, quiet = look(database, names, cursor)
    assert quiet == QUIET
    execute(database.adbc_uri, "UPDATE songs SET lyrics = 'new' WHERE id = 1")
    assert look(database, names, cursor)[1] is None


@pytest.mark.parametrize("cursor", ["", "[2, 2, null, 7]", "{}", "null", '{"source": 1}', "no json"])
def test_a_cursor_of_another_version_is_taken_for_none(database: Database, cursor: str) -> None:
    names = create(database, "table")
    now, quiet = look(database, names, cursor)
    assert quiet is None
    assert look(database, names, now)[1] == "nothing changed"
    assert look(database, names.model_copy(update={"lyrics_column": "artist"}), now)[1] is None, "other columns"


def test_ids_of_the_same_number_sum_and_maximum_are_not_the_same_and_none_is_too_large(database: Database) -> None:
    execute(database.adbc_uri, SONGS_BIG)
    source = find_source(database, PostgresSettings())
    states = []
    for ids in ("1, 4, 9", "2, 3, 9", "-3, 9000000000000000000, 9223372036854775807"):
        execute(database.adbc_uri, f"TRUNCATE songs; INSERT INTO songs SELECT unnest(ARRAY[{ids}]::bigint[])")
        states.append(measure_source(source))
    assert [each.n_songs for each in states] == [3, 3, 3]
    assert states[0].highest_id == states[1].highest_id
    assert len({each.ids for each in states}) == 3


def test_a_digest_takes_a_twentieth_of_the_time_at_most() -> None:
    state = SourceState(IdSums(2, 3, 5), 2, None, 7)
    seen = SourceLook("s", state, Digest("a", at=1_000.0, took_s=3.0), is_current=True)
    assert not seen.wants_digest(state, now=9_999.0), "nothing was written"
    written, more = replace(state, n_writes=8), SourceState(IdSums(3, 6, 14), 3, None, 9)
    assert [seen.wants_digest(written, now) for now in (1_059.0, 1_060.0, 900.0)] == [False, True, True]
    view = replace(seen, state=replace(state, n_writes=None))
    assert [view.wants_digest(view.state, now) for now in (1_059.0, 1_060.0)] == [False, True]
    waiting = seen.judge(written, None)
    assert (waiting.look, waiting.changed) == (seen, False), "it is not forgotten"
    assert "compared later" in waiting.note
    found = seen.judge(more, None)
    grown = found.look
    assert (found.changed, grown.is_current) == (True, False), "songs that came are reported at once"
    assert grown.wants_digest(more, now=1_060.0)
    assert not grown.judge(more, Digest("b", 1_060.0, 3.0)).changed, "since those were reported"
    assert grown.judge(replace(more, n_writes=10), Digest("b", 1_060.0, 3.0)).changed


def test_a_view_and_a_column_of_times_are_looked_at_as_they_can_be(database: Database) -> None:
    execute(
        database.adbc_uri,
        """CREATE TABLE "T%" (id integer PRIMARY KEY, name text, artist text, lyrics text, "at" timestamptz);
        INSERT INTO "T%" VALUES (1, 'n', 'a', 'l', '2026-01-02 03:04:05+00');
        CREATE VIEW seen AS SELECT * FROM "T%" """,
    )
    table = find_source(database, PostgresSettings(songs_table="T%", updated_at_column="at"))
    state = measure_source(table)
    assert (state.n_songs, state.highest_id, state.newest is not None) == (1, 1, True)
    assert look(database, PostgresSettings(songs_table="T%"), None)[1] is None
    view = find_source(database, PostgresSettings(songs_table="seen", song_id_column="id"))
    assert measure_source(view).n_writes is None
