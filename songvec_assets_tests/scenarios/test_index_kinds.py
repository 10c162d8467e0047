"""Searches by each kind of index, while it is built of another mean or as another kind, and by a reader."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.search.nearest import record_source, search_songs
from songvec_assets.search.query import Query
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.source import SongsSource, find_source
from songvec_assets.vectors.index import bits
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.kinds import KINDS
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import as_role, dispose, execute, wait_until
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.vectors.conftest import SPEC, cache, load, make_vector, put
from songvec_assets_tests.vectors.indexes import build_index

__all__ = ["cache"]

N_SONGS, DIMENSIONS = 200, 64
WIDE = TableSpec(SPEC.model, DIMENSIONS)
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def cache_of_64(cache: ModelCache) -> ModelCache:
    """Two hundred songs in a cache, with enough values to tell them apart by their bits."""
    wide = ModelCache(cache.storage, WIDE.model, DIMENSIONS)
    put(wide, range(N_SONGS))
    return wide


@pytest.fixture
def source(database: Database, songs: Callable[..., None], cache_of_64: ModelCache) -> SongsSource:
    """The songs, loaded; the planner takes an index though the table is small."""
    songs(*((song_id, f"Song {song_id}", "Ann" if song_id % 4 else "Ben", "la") for song_id in range(N_SONGS)))
    load(database, cache_of_64, WIDE)
    found = find_source(database, PostgresSettings())
    record_source(database, found, ["artist"])
    name = sa.make_url(database.url).database
    for setting in ("enable_seqscan", "enable_sort"):
        execute(database.adbc_uri, f"ALTER DATABASE {name} SET {setting} = off")
    dispose(database.url)
    return found


def build(database: Database, cache: ModelCache, kind: str, **wanted: object) -> None:
    """Build the index as a kind."""
    build_index(database, cache, WIDE, IndexSettings(kind=kind, **wanted))  # type: ignore[arg-type]


def nearest(song_id: int, limit: int, among: Callable[[int], bool] = lambda _: True) -> list[int]:
    """The true answer of a search for a song's vector."""
    vector = make_vector(song_id, dimensions=DIMENSIONS)
    others = {n: float(make_vector(n, dimensions=DIMENSIONS) @ vector) for n in range(N_SONGS) if among(n)}
    return sorted(others, key=lambda n: -others[n])[:limit]


@ALL_KINDS
@pytest.mark.parametrize("before_0_8", [False, True])
def test_each_kind_finds_what_is_nearest_under_any_limit_and_condition(
    database: Database, cache_of_64: ModelCache, source: SongsSource, kind: str, before_0_8: bool
) -> None:
    build(database, cache_of_64, kind)
    index = VectorTable(database).index
    assert index is not None
    assert index.kind == kind
    assert (index.candidates is None) == (not KINDS[kind].is_bits)
    with searching_as_before_0_8(database) if before_0_8 else nullcontext():
        check_searches(database, source)


@contextmanager
def searching_as_before_0_8(database: Database) -> Iterator[None]:
    """As with pgvector 0.7, whose scans cannot go on."""
    [(body,)] = execute(database.adbc_uri, "SELECT pg_get_functiondef('songvec.search'::regproc)")
    former = body.replace("'{ivfflat.probes,ivfflat.iterative_scan,", "'{ivfflat.probes,ivfflat.none,")
    assert former != body
    execute(database.adbc_uri, former)
    try:
        yield
    finally:
        execute(database.adbc_uri, body)


def check_searches(database: Database, source: SongsSource) -> None:
    """Compare what searches find with the true answers."""
    for limit in (1, 10, 60, 1000):
        hits = search_songs(database, source, Query(make_vector(7, dimensions=DIMENSIONS), limit=limit))
        assert [hit.song_id for hit in hits][:3] == nearest(7, 3)[:limit]
        assert len(hits) == min(limit, N_SONGS)
        assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
    where = [("artist", "=", "Ben")]
    query = Query(make_vector(7, dimensions=DIMENSIONS), limit=1000, where=where, columns=["artist"])
    assert [hit.song_id for hit in search_songs(database, source, query)] == nearest(7, 1000, lambda n: n % 4 == 0)
    similar = search_songs(database, source, Query(song_id=7, limit=1000))
    assert [hit.song_id for hit in similar] == nearest(7, 1000, lambda n: n != 7)
    both = search_songs(database, source, Query(make_vector(7, dimensions=DIMENSIONS), "Song 9", limit=2))
    assert {hit.song_id for hit in both} == {7, 9}


@contextmanager
def searching(database: Database, source: SongsSource) -> Iterator[list[object]]:
    """Search for songs by their own vectors while the block runs; what was found or went wrong.

    One thread has the pool's sessions, which know an index for long, the other a new one for each search.
    """
    ended, found = threading.Event(), list[object]()

    def by_pool(song_id: int) -> list[int]:
        query = Query(make_vector(song_id, dimensions=DIMENSIONS), limit=3)
        return [hit.song_id for hit in search_songs(database, source, query)]

    def by_session(song_id: int) -> list[int]:
        vector = str(make_vector(song_id, dimensions=DIMENSIONS).tolist())
        rows = execute(database.adbc_uri, "SELECT song_id FROM songvec.search(%s, 3)", (vector,))
        return [each for (each,) in rows]

    def search(ask: Callable[[int], list[int]]) -> None:
        for song_id in itertools.cycle(range(0, N_SONGS, 3)):
            if ended.is_set():
                return
            try:
                hits = ask(song_id)
            except Exception as error:  # noqa: BLE001 - looked at by the test
                hits = [error]  # type: ignore[list-item]
            found.append(None if hits[0] == song_id and len(hits) == 3 else (song_id, hits))

    threads = [threading.Thread(target=search, args=(ask,)) for ask in (by_pool, by_session)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(("kind", "n_candidates"), [("ivfflat_bit", 3), ("hnsw_bit", 20)])
def test_while_the_mean_changes_each_search_finds_the_song_of_its_vector(
    database: Database, cache_of_64: ModelCache, source: SongsSource, kind: str, n_candidates: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Among few candidates: bits of one mean, compared with bits of another, put many songs too far for these."""
    monkeypatch.setattr("songvec_assets.vectors.index.catalog.FIRST_CANDIDATES", n_candidates)
    draw = np.random.default_rng(0)
    means = [str((0.15 * draw.standard_normal(DIMENSIONS)).round(4).tolist()) for _ in range(6)]
    made = iter(means)
    monkeypatch.setattr(bits, "read_mean", lambda *_: next(made))
    monkeypatch.setattr(
        "songvec_assets.vectors.index.upkeep.measure_and_record", lambda *_, **__: (None, "not measured")
    )
    build(database, cache_of_64, kind)
    functions = set()
    with searching(database, source) as found:
        for _ in means[1:]:
            n_before = len(found)
            wait_until(lambda n_before=n_before: len(found) > n_before + 20)
            build(database, cache_of_64, kind, rebuild=True)
            functions |= {*execute(database.adbc_uri, "SELECT proname FROM pg_proc WHERE proname LIKE 'bits\\_%'")}
    assert len(found) > 100
    assert [each for each in found if each is not None] == []
    assert functions == {(bits.name_function(mean),) for mean in means[1:]}, "each was made and dropped"


def test_while_the_kind_changes_each_search_finds_the_song_of_its_vector(
    database: Database, cache_of_64: ModelCache, source: SongsSource
) -> None:
    build(database, cache_of_64, "ivfflat")
    with searching(database, source) as found:
        for kind in (*KINDS, "ivfflat"):
            build(database, cache_of_64, kind)
            n_before = len(found)
            wait_until(lambda n_before=n_before: len(found) > n_before + 20)
            index = VectorTable(database).index
            assert index is not None
            assert index.kind == kind
    assert [each for each in found if each is not None] == []


@ALL_KINDS
def test_a_reader_searches_through_a_pooler_by_each_kind(
    database: Database, cache_of_64: ModelCache, source: SongsSource, kind: str
) -> None:
    with as_role(database) as reader:
        role = sa.make_url(reader.url).username
        execute(
            database.adbc_uri,
            f"GRANT USAGE ON SCHEMA songvec TO {role};"
            f"GRANT SELECT ON songvec.settings, song_embeddings, songs TO {role};"
            f"GRANT INSERT ON song_embeddings TO {role}",
        )
        build(database, cache_of_64, kind)
        with running_pgbouncer(reader.url) as url:
            vector = str(make_vector(7, dimensions=DIMENSIONS).tolist())
            rows = execute(url, "SELECT song_id FROM songvec.search(%s, 10)", (vector,))
            assert [song_id for (song_id,) in rows] == nearest(7, 10)
            rows = execute(url, "SELECT song_id FROM songvec.similar(7, 3)")
            assert [song_id for (song_id,) in rows] == nearest(7, 4)[1:]
            # what a loader writes is indexed by the same function, with the loader's rights
            execute(url, "INSERT INTO song_embeddings VALUES (-1, %s)", (vector,))
            dispose(url)
