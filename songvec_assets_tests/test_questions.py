"""The questions about the whole graph: what they answer, and that they change nothing and cost nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from songvec_assets.errors import ProviderError, SourceError, StoreError, TableMismatchError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider

FIRST, SECOND, THIRD = (SongIdRange(start, start + 100) for start in (0, 100, 200))
SONGS = [(1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", "stones"), (150, "Moon", "Cy", "silver")]


@pytest.fixture
def filled(pipeline: Pipeline, songs: Callable[..., None]) -> Pipeline:
    """Three songs in two ranges, exported and embedded; a fourth that is new."""
    songs(*SONGS)
    pipeline.export()
    pipeline.filler().fill_ranges(list(pipeline.tiling), lambda _: None)
    songs((250, "Dune", "Dee", "sand"))
    return pipeline


def test_the_ranges_that_hold_songs_or_cache_are_asked_for_in_order(filled: Pipeline) -> None:
    assert filled.held_ranges() == [FIRST, SECOND, THIRD]
    execute(filled.database.adbc_uri, "DELETE FROM songs WHERE id < 100")
    assert filled.held_ranges() == [FIRST, SECOND, THIRD], "the first has a cache still"
    execute(filled.database.adbc_uri, "DROP TABLE songs")
    with pytest.raises(SourceError):
        Pipeline(filled.settings).held_ranges()


def test_a_status_names_who_fills_loads_and_builds_and_nobody_afterwards(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path
) -> None:
    songs(*SONGS)
    seen: dict[str, set[str]] = {}
    other = make_pipeline(database, provider, tmp_path / "store")

    def look(_: object) -> None:
        for holder in other.status().holders:
            seen.setdefault(f"{holder.task} {holder.key}".strip(), set()).add(holder.run_id)

    working = Pipeline(other.settings, run_id="1a2b3c4d-5e6f-4711-8899-aabbccddeeff")
    # a filled range is reported before the next one, which is open by then, is done
    provider.control(latency_s=0.2)
    working.run(progress=look)
    assert {f"filling {FIRST.key}", "loading", "building the index"} <= seen.keys()
    assert set().union(*seen.values()) == {"1a2b3c4d"}
    assert not other.status().holders


def test_an_estimate_is_of_what_is_exported_and_missing(filled: Pipeline, provider: Provider) -> None:
    before = provider.ledger()["requests"]
    found = filled.estimate()
    assert (found.n_songs, found.n_texts, found.n_tokens) == (3, 0, 0)
    filled.export()
    found = filled.estimate()
    assert (found.n_songs, found.n_texts) == (4, 1)
    assert found.n_tokens > 0
    assert (filled.estimate([FIRST]).n_songs, filled.estimate([FIRST]).n_texts) == (2, 0)
    assert (filled.estimate(reembed=True).n_texts, filled.estimate([FIRST], reembed=True).n_texts) == (4, 2)
    assert provider.ledger()["requests"] == before


def test_a_dry_run_says_each_step_and_does_none(filled: Pipeline, provider: Provider, tmp_path: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    before = provider.ledger()["requests"]
    plan = filled.dry_run()
    steps = [line.partition(":")[0] for line in plan.describe()]
    assert steps == ["export", "delete", "embed", "load", "index"]
    assert (plan.n_songs, plan.load.n_changed if plan.load else None, plan.index) == (4, 3, None)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    assert provider.ledger()["requests"] == before
    provider.control(redirect="https://elsewhere.invalid/v1/embeddings")
    with pytest.raises(ProviderError, match="redirects"):
        filled.dry_run()


def test_a_snapshot_that_cannot_be_read_makes_no_estimate_cheaper(filled: Pipeline) -> None:
    path = filled.storage.root / "songs" / f"{SECOND.key}.parquet"
    path.write_bytes(b"no snapshot")
    for ask in (filled.estimate, filled.dry_run, lambda: filled.estimate([SECOND])):
        with pytest.raises(StoreError, match=r"is damaged .* remove it and export again"):
            ask()
    assert filled.estimate([FIRST]).n_songs == 2, "the other one is not asked for"
    path.unlink()
    assert filled.estimate().n_songs == 2, "not exported"


def test_only_an_empty_cache_is_called_one(filled: Pipeline) -> None:
    empty = Pipeline(filled.settings.model_copy(update={"embedding_dimensions": 32}))
    assert empty.dry_run().load is None
    (filled.cache.storage.root / "elsewhere").mkdir()
    with pytest.raises(StoreError, match="elsewhere"):
        filled.dry_run()


def test_before_a_load_there_is_nothing_to_verify_and_after_it_every_check_has_a_finding(filled: Pipeline) -> None:
    with pytest.raises(TableMismatchError):
        filled.verify()
    filled.export()
    filled.filler().fill_ranges(list(filled.tiling), lambda _: None)
    filled.load()
    found = filled.verify()
    assert len(found) >= 10
    assert not found["index_is_used"].passed, "none was built"
    assert found["coverage"].passed


def test_songs_that_left_the_source_are_in_the_plan_and_stay(filled: Pipeline) -> None:
    assert filled.dry_run().missing.n_missing == 0
    execute(filled.database.adbc_uri, "DELETE FROM songs WHERE id = 150")
    missing = Pipeline(filled.settings).dry_run().missing
    assert (missing.n_missing, missing.n_known) == (1, 3)
    assert filled.cache.open(SECOND).rows["song_id"].to_list() == [150]


def test_after_a_swap_searches_use_the_model_that_is_served(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path
) -> None:
    songs(*SONGS)
    first = make_pipeline(database, provider, tmp_path, query_prompt="find: {query}")
    first.run()
    other = make_pipeline(database, provider, tmp_path, embedding_dimensions=32, query_prompt="find: {query}")
    assert other.as_loaded().settings.dimensions == 64
    assert other.as_loaded().settings.query_prompt == "find: {query}"
    assert make_pipeline(database, provider, tmp_path).as_loaded().table_spec == first.table_spec


def test_boilerplate_is_told_with_a_view_that_removes_it(pipeline: Pipeline, songs: Callable[..., None]) -> None:
    songs(*((song_id, f"Song {song_id}", "Ann", f"la {song_id}") for song_id in range(1, 30)))
    assert pipeline.describe_boilerplate() == []
    execute(pipeline.database.adbc_uri, "UPDATE songs SET lyrics = '[00:12.34] ' || lyrics")
    words, view = Pipeline(pipeline.settings).describe_boilerplate()
    assert "LRC time stamps" in words
    assert "CREATE" in view
    without = Pipeline(pipeline.settings.model_copy(update={"text_template": "{name} by {artist}"}))
    assert without.describe_boilerplate() == [], "lyrics are not embedded"
