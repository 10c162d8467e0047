"""The songs that were paid for or are served: by the cache, by the table, each once."""

import sqlalchemy as sa

from songvec_assets.known import CachedOrLoaded
from songvec_assets.pipeline import Pipeline
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets_tests.administration import execute

FIRST, SECOND = SongIdRange(0, 100), SongIdRange(100, 200)


def known(pipeline: Pipeline, tiling: Tiling | None = None) -> CachedOrLoaded:
    return CachedOrLoaded(pipeline.database, pipeline.cache, tiling or pipeline.tiling)


def run(pipeline: Pipeline, load: bool = True) -> None:
    pipeline.export()
    pipeline.filler().fill_ranges(list(pipeline.tiling), lambda _: None)
    if load:
        pipeline.load()


def test_nothing_is_known_at_first(pipeline: Pipeline, songs) -> None:
    songs((1, "Sea", "Ann", "waves"))
    pipeline.bind()
    assert known(pipeline).counts() == {}
    assert known(pipeline).song_ids(FIRST).is_empty()


def test_a_song_is_known_once_whether_it_is_cached_or_loaded(pipeline: Pipeline, songs) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", "stones"), (150, "Moon", "Cy", "silver"))
    run(pipeline, load=False)
    assert known(pipeline).counts() == {FIRST: 2, SECOND: 1}
    pipeline.load()
    assert known(pipeline).counts() == {FIRST: 2, SECOND: 1}
    assert sorted(known(pipeline).song_ids(FIRST)) == [1, 2]
    for path in (pipeline.cache.storage.root / FIRST.key).iterdir():
        path.unlink()
    assert known(pipeline).counts() == {FIRST: 2, SECOND: 1}, "the table has them still"
    assert sorted(known(pipeline).song_ids(FIRST)) == [1, 2]


def test_a_song_whose_deletion_was_accepted_is_not_known_though_it_is_loaded(pipeline: Pipeline, songs) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", "stones"))
    run(pipeline)
    execute(pipeline.database.adbc_uri, "DELETE FROM songs WHERE id = 2")
    run(pipeline, load=False)
    with pipeline.database.get_connection() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM song_embeddings")) == 2
    assert known(pipeline).song_ids(FIRST).to_list() == [1]


def test_a_ledger_of_another_division_is_counted_by_the_ranges_asked_for(pipeline: Pipeline, songs) -> None:
    songs((1_050, "Sea", "Ann", "waves"), (1_150, "Hill", "Ben", "stones"))
    run(pipeline)
    higher = Tiling(width=100, stop=2_000)
    without_cache = Pipeline(pipeline.settings.model_copy(update={"embedding_model": "another/model"}))
    counts = CachedOrLoaded(pipeline.database, without_cache.cache, higher).counts()
    assert counts == {SongIdRange(1_000, 1_100): 1, SongIdRange(1_100, 1_200): 1}
    ids = CachedOrLoaded(pipeline.database, without_cache.cache, higher).song_ids(SongIdRange(1_100, 1_200))
    assert ids.to_list() == [1_150]
