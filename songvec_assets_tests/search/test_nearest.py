"""From a vector to the nearest songs, exactly and through the index."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cli import app, base
from songvec_assets.errors import DatabaseError, TableMismatchError
from songvec_assets.postgres.engine import Database, Profile
from songvec_assets.postgres.messages import ReportingCursor
from songvec_assets.postgres.schema import write_value
from songvec_assets.search.nearest import Hit, check_searchable, record_source, search_songs
from songvec_assets.search.query import Query
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.source import SongsSource, find_source
from songvec_assets.vectors.index.audit import find_neighbors
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import dispose, execute
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.vectors.conftest import DIMENSIONS, SPEC, load, make_vector, put
from songvec_assets_tests.vectors.indexes import build_index


@pytest.fixture
def source(database: Database, songs: Callable[..., None], cache: ModelCache) -> SongsSource:
    """A hundred songs, loaded."""
    songs(*((song_id, f"Song {song_id}", "Ann", "la" if song_id % 2 else None) for song_id in range(1, 101)))
    put(cache, range(1, 101))
    load(database, cache)
    return find_source(database, PostgresSettings())


def nearest(query: np.ndarray, n_songs: int = 100) -> list[tuple[int, float]]:
    """The songs and their cosine similarities by arithmetic of our own, nearest first."""
    similarities = {song_id: float(make_vector(song_id) @ query) / float(np.linalg.norm(query))
                    for song_id in range(1, n_songs + 1)}  # fmt: skip
    return sorted(similarities.items(), key=lambda pair: -pair[1])


def use_index(database: Database) -> None:
    """Let the planner take the index though the table is small."""
    execute(database.adbc_uri, f"ALTER DATABASE {sa.make_url(database.url).database} SET enable_seqscan = off")
    dispose(database.url)


def test_the_nearest_songs_come_first_with_their_similarity(database: Database, source: SongsSource) -> None:
    query = 3 * make_vector(5, version=9)
    hits = search_songs(database, source, Query(query, limit=7, model=SPEC.model))
    expected = nearest(query)[:7]
    assert [hit.song_id for hit in hits] == [song_id for song_id, _ in expected]
    assert [hit.similarity for hit in hits] == pytest.approx([similarity for _, similarity in expected], abs=1e-6)


def test_a_hit_shows_the_song_as_the_source_has_it_now(database: Database, source: SongsSource) -> None:
    execute(database.adbc_uri, "UPDATE songs SET name = 'Renamed' WHERE id = 8")
    hits = search_songs(database, source, Query(make_vector(8), limit=1, model=SPEC.model))
    assert hits == [Hit(8, "Renamed", "Ann", None, pytest.approx(1.0, abs=1e-6))]


def test_a_song_deleted_from_the_source_is_left_out_and_the_next_one_comes_instead(
    database: Database, source: SongsSource
) -> None:
    first, second, third, fourth = [song_id for song_id, _ in nearest(make_vector(8))][:4]
    execute(database.adbc_uri, "DELETE FROM songs WHERE id = %s", (second,))
    hits = search_songs(database, source, Query(make_vector(8), limit=3, model=SPEC.model))
    assert [hit.song_id for hit in hits] == [first, third, fourth]


@pytest.mark.parametrize("limit", [1, 100, 1000])
def test_no_more_songs_come_than_asked_for_or_there(database: Database, source: SongsSource, limit: int) -> None:
    assert len(search_songs(database, source, Query(make_vector(8), limit=limit, model=SPEC.model))) == min(limit, 100)


@pytest.fixture
def indexed(database: Database, source: SongsSource, cache: ModelCache) -> SongsSource:
    """The hundred songs under ten lists, of which searches visit one."""
    build_index(database, cache, SPEC)
    use_index(database)
    with database.get_connection() as connection:
        write_value(connection, "probes", 1)
    return source


@contextlib.contextmanager
def recording(database: Database) -> Iterator[list[str]]:
    """What searches of this process do while the block runs: `checkout` of the pool, and the statements sent."""
    seen: list[str] = []

    class Recording(ReportingCursor):
        def execute(self, query: object, parameters: object = None) -> None:
            seen.append(str(query) if self.connection.autocommit else f"BEGIN; {query}")
            super().execute(query, parameters)

    def check_out(connection: Any, *_: object) -> None:
        seen.append("checkout")

    def connect(connection: Any, *_: object) -> None:
        connection.cursor_factory = Recording

    listeners = {"checkout": check_out, "connect": connect}
    engine = database.get_engine("web")
    engine.dispose()
    for name, listener in listeners.items():
        sa.event.listen(engine, name, listener)
    try:
        yield seen
    finally:
        for name, listener in listeners.items():
            sa.event.remove(engine, name, listener)
        engine.dispose()


def test_searches_share_one_pooled_connection(database: Database, source: SongsSource) -> None:
    opened: list[str] = []

    def note(profile: Profile) -> Callable[..., None]:
        return lambda *_: opened.append(profile)

    listeners = {profile: note(profile) for profile in get_args(Profile)}
    for profile, listener in listeners.items():
        sa.event.listen(database.get_engine(profile), "connect", listener)
    for _ in range(3):
        check_searchable(database, SPEC)
        assert len(search_songs(database, source, Query(make_vector(8), limit=3, model=SPEC.model))) == 3
    assert opened == ["web"]


def test_through_the_index_a_search_visits_as_many_lists_as_recorded(database: Database, indexed: SongsSource) -> None:
    # the lists are drawn by chance: of one query the nearest five may lie in one list, of forty they do not
    queries = [make_vector(song_id) for song_id in range(1, 41)]
    exact = [[song_id for song_id, _ in nearest(query)][:5] for query in queries]
    found = {}
    for probes in (1, 10):
        with database.get_connection() as connection:
            write_value(connection, "probes", probes)
        asked = (search_songs(database, indexed, Query(query, limit=5)) for query in queries)
        found[probes] = [[hit.song_id for hit in hits] for hits in asked]
    assert found[10] == exact
    assert found[1] != exact, "one list of ten does not hold the nearest five of all queries"


@pytest.mark.parametrize("limit", [40, 99, 100, 1000])
def test_a_limit_beyond_what_the_lists_visited_hold_is_filled_from_further_lists(
    database: Database, indexed: SongsSource, limit: int
) -> None:
    hits = search_songs(database, indexed, Query(make_vector(8), limit=limit, model=SPEC.model))
    assert len(hits) == len({hit.song_id for hit in hits}) == min(limit, 100)
    similarities = [hit.similarity for hit in hits]
    assert similarities == sorted(similarities, reverse=True)
    if limit >= 100:
        assert [hit.song_id for hit in hits] == [song_id for song_id, _ in nearest(make_vector(8))]


def test_a_search_is_one_statement_of_one_connection_after_the_pools_own_test(
    database: Database, indexed: SongsSource
) -> None:
    with recording(database) as seen:
        search_songs(database, indexed, Query(make_vector(8)))
        seen.clear()  # a new connection
        assert len(search_songs(database, indexed, Query(make_vector(8), limit=1000))) == 100
    assert [each.split("(")[0].split()[0] for each in seen] == ["SELECT", "checkout", "SET"], seen
    assert "songvec.search" in seen[-1]


def test_the_command_shows_as_many_songs_as_asked_for(
    database: Database, songs: Callable[..., None], provider: Provider, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    songs(*((song_id, f"Tune {song_id}", "Ann", "la") for song_id in range(1, 101)))
    pipeline = make_pipeline(database, provider, tmp_path / "store")
    pipeline.export()
    pipeline.filler().fill_ranges(pipeline.held_ranges(), lambda _: None)
    pipeline.load()
    pipeline.build_index()
    use_index(database)
    with database.get_connection() as connection:
        write_value(connection, "probes", 1)
    monkeypatch.setattr(base, "make_searches", lambda **_: pipeline)
    with pytest.raises(SystemExit) as ended:
        app(["search", "a storm at sea", "-n", "100"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("Tune ") == 100


def test_the_comparison_of_two_tables_sees_ten_neighbours_of_each_song(
    database: Database, indexed: SongsSource
) -> None:
    with database.get_connection() as connection:
        found = find_neighbors(connection, VectorTable(database), [7, 8])
    assert [len(each) for each in found.values()] == [10, 10]


def test_the_songs_table_is_recorded_when_it_changed_and_only_then(database: Database, source: SongsSource) -> None:
    recorded = "SELECT value -> 'columns', xmin, xmax FROM songvec.settings WHERE key = 'search'"
    record_source(database, source, ["artist"])
    before = execute(database.adbc_uri, recorded)
    record_source(database, source, ["artist"])
    assert execute(database.adbc_uri, recorded) == before
    record_source(database, source, ["name"])
    assert execute(database.adbc_uri, recorded)[0][0] == ["name"]


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "AUTOCOMMIT"])
def test_a_search_leaves_no_setting_behind_in_its_session(
    database: Database, indexed: SongsSource, isolation: str
) -> None:
    record_source(database, indexed, ())
    knobs = ("search_path", "jit", "ivfflat.probes", "ivfflat.iterative_scan", "ivfflat.max_probes")
    shown = sa.text("SELECT " + ", ".join(f"current_setting('{each}')" for each in knobs))
    engine = database.get_engine("web").execution_options(isolation_level=isolation)
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT '[1]'::vector, set_config('ivfflat.probes', '3', :local)"),
                           {"local": isolation != "AUTOCOMMIT"})  # fmt: skip
        before = connection.execute(shown).one()
        for query in ("songvec.search(:vector, 50)", "songvec.similar(8)"):
            n_found = connection.scalar(
                sa.text(f"SELECT count(*) FROM {query}"), {"vector": str(make_vector(8).tolist())}
            )
            assert n_found in (10, 50)
            assert connection.execute(shown).one() == before
        connection.execute(sa.text("RESET ALL"))


def test_halfvec_tables_are_searched_alike(database: Database, songs: Callable[..., None], cache: ModelCache) -> None:
    spec = TableSpec("model-a", DIMENSIONS, "halfvec")
    songs(*((song_id, "Song", "Ann", None) for song_id in range(1, 101)))
    put(cache, range(1, 101))
    load(database, cache, spec)
    hits = search_songs(
        database, find_source(database, PostgresSettings()), Query(make_vector(8), limit=3, model=spec.model)
    )
    expected = nearest(make_vector(8))[:3]
    assert [hit.song_id for hit in hits] == [song_id for song_id, _ in expected]
    assert [hit.similarity for hit in hits] == pytest.approx([similarity for _, similarity in expected], abs=2e-3)


@pytest.mark.parametrize("column", ['Naïve "name"', "100%", "%(name)s", ":name"])
def test_a_source_with_odd_names_is_searched(database: Database, cache: ModelCache, column: str) -> None:
    quoted = column.replace('"', '""')
    execute(
        database.adbc_uri,
        f'CREATE TABLE "Songs" (id bigint PRIMARY KEY, "{quoted}" text, artist text, lyrics text);'
        """INSERT INTO "Songs" VALUES (7, 'Sea', 'Ann', 'waves')""",
    )
    put(cache, [7])
    load(database, cache)
    source = find_source(database, PostgresSettings(songs_table="Songs", name_column=column))
    hits = search_songs(database, source, Query(make_vector(7), model=SPEC.model))
    assert [(hit.song_id, hit.name, hit.lyrics) for hit in hits] == [(7, "Sea", "waves")]


def test_before_the_first_load_it_says_what_to_run(database: Database, songs: Callable[..., None]) -> None:
    songs((1, "Sea", "Ann", None))
    with pytest.raises(TableMismatchError, match=r"nothing is loaded yet.*`songvec run` first"):
        search_songs(database, find_source(database, PostgresSettings()), Query(make_vector(1), model=SPEC.model))


@pytest.mark.parametrize("spec", [TableSpec("model-b", DIMENSIONS), TableSpec("model-a", 16)])
def test_a_query_of_another_model_or_size_is_refused(database: Database, source: SongsSource, spec: TableSpec) -> None:
    with pytest.raises(TableMismatchError):
        search_songs(database, source, Query(make_vector(1, dimensions=spec.dimensions), model=spec.model))


SPIED = """
    CREATE SCHEMA spied;
    CREATE TABLE spied.seen (name text);
    CREATE FUNCTION spied.note(name text) RETURNS text LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO spied.seen VALUES (name); RETURN name; END $$;
    CREATE FUNCTION spied.wait(name text) RETURNS text LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep(5); RETURN name; END $$;
    CREATE VIEW spied.noting AS SELECT id, spied.note(name) AS name, artist, lyrics FROM songs;
    CREATE VIEW spied.waiting AS SELECT id, spied.wait(name) AS name, artist, lyrics FROM songs;
"""


@pytest.mark.parametrize(
    ("view", "timeout_s", "code", "words"),
    [
        ("noting", None, "database.read-only", "cannot execute INSERT in a read-only transaction"),
        ("waiting", 0.2, "database.unavailable", "due to statement timeout"),
    ],
)
def test_a_search_writes_nothing_and_may_be_given_a_time(
    database: Database, source: SongsSource, view: str, timeout_s: float | None, code: str, words: str
) -> None:
    execute(database.adbc_uri, SPIED)
    spied = replace(source, table=view, relation=f"spied.{view}")
    with pytest.raises(DatabaseError, match=words) as refused:
        search_songs(database, spied, Query(make_vector(8), limit=1, model=SPEC.model), timeout_s)
    assert refused.value.code == code
    # nothing of it stays with the connection
    assert len(search_songs(database, source, Query(make_vector(8), limit=1, model=SPEC.model))) == 1
    with database.get_connection("web") as connection:
        assert connection.scalar(sa.text("SHOW statement_timeout")) == "0"
        connection.execute(sa.text("INSERT INTO spied.seen VALUES ('')"))
