"""Songs that are embedded again on request: once for each request, and resumable as any fill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from songvec_assets.cache import completion, reembedding
from songvec_assets.cache.cached_range import CachedRange
from songvec_assets.cache.plan import FillReport
from songvec_assets.errors import BudgetExceededError, SongvecError, StoreError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider

N_SONGS = 30
FIRST = SongIdRange(0, 100)
Begin = Callable[..., Pipeline]


@pytest.fixture
def begin(database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path) -> Begin:
    """Begins a run over a store that has all songs embedded already."""
    songs(*((song_id, f"Song {song_id}", "Ann", "la") for song_id in range(1, N_SONGS + 1)))

    def begin(**settings: object) -> Pipeline:
        given = {"max_request_texts": 5, "concurrency": 2, "usd_per_million_tokens": 1e6}
        return make_pipeline(database, provider, tmp_path, **(given | settings))

    pipeline = begin()
    pipeline.export()
    fill(pipeline)
    provider.reset_ledger()
    return begin


def fill(pipeline: Pipeline, reembed: str | None = None) -> tuple[FillReport, SongvecError | None]:
    """Fill the first range."""
    reports: list[FillReport] = []
    try:
        pipeline.filler(reembed=reembed).fill_ranges([FIRST], reports.append)
    except SongvecError as error:
        return reports[0], error
    return reports[0], None


def sent(provider: Provider) -> dict[str, int]:
    """How often each song's text was billed since."""
    return {text: count for text, count in provider.texts().items() if text != "probe"}


def test_each_text_is_paid_for_again_once_for_each_who_asks(begin: Begin, provider: Provider) -> None:
    report, _ = fill(begin(), reembed="one")
    assert (report.n_embedded, report.n_reused) == (N_SONGS, 0)
    assert set(sent(provider).values()) == {1}
    report, _ = fill(begin(), reembed="one")
    assert report.n_unchanged == N_SONGS
    assert set(sent(provider).values()) == {1}
    fill(begin(), reembed="another")
    assert set(sent(provider).values()) == {2}
    fill(begin(), reembed="one")
    fill(begin())
    assert set(sent(provider).values()) == {2}, "what was served stays served, whatever came after"


@pytest.mark.parametrize("again", ["one", "the same command in another run"])
def test_what_was_stopped_goes_on_with_the_rest(begin: Begin, provider: Provider, again: str) -> None:
    _, error = fill(begin(max_usd=80), reembed="one")
    assert isinstance(error, BudgetExceededError)
    n_first = len(sent(provider))
    assert 0 < n_first < N_SONGS
    report, _ = fill(begin(), reembed=again)
    assert report.n_embedded == N_SONGS - n_first
    assert set(sent(provider).values()) == {1}
    assert len(sent(provider)) == N_SONGS
    report, _ = fill(begin(), reembed="one")
    assert report.n_unchanged == N_SONGS


def test_a_plain_run_in_between_pays_nothing_and_the_rest_stays_owed(begin: Begin, provider: Provider) -> None:
    fill(begin(max_usd=80), reembed="one")
    n_first = len(sent(provider))
    report, _ = fill(begin())
    assert (report.n_unchanged, len(sent(provider))) == (N_SONGS, n_first)
    report, _ = fill(begin(), reembed="one")
    assert report.n_embedded == N_SONGS - n_first
    assert set(sent(provider).values()) == {1}


@pytest.mark.parametrize("settings", [{"max_usd": 0.0}, {"fireworks_api_key": "wrong"}])
def test_where_nothing_could_be_sent_nothing_is_given_up(
    begin: Begin, provider: Provider, settings: dict[str, object]
) -> None:
    _, error = fill(begin(**settings), reembed="one")
    assert error is not None
    assert len(begin().load().loads) == 1
    report, _ = fill(begin())
    assert (report.n_unchanged, sent(provider)) == (N_SONGS, {})


def test_loads_in_between_keep_the_old_vectors_until_all_new_ones_are_there(begin: Begin) -> None:
    begin().load()
    before = begin().cache.open(FIRST).rows.drop("row")
    fill(begin(max_usd=80), reembed="one")
    (load,) = begin().load().loads
    assert (load.n_rows, load.n_written) == (N_SONGS, 0)
    assert begin().cache.open(FIRST).rows.drop("row").equals(before)
    fill(begin(), reembed="one")
    (load,) = begin().load().loads
    assert load.n_rows == N_SONGS
    folder = begin().cache.storage.root / FIRST.key
    assert [path.name.split("-")[0] for path in folder.glob("*.arrow")] == ["1"], "the old generation is removed"


def test_songs_deleted_before_keep_their_vectors_and_rejected_ones_their_reason(
    begin: Begin, provider: Provider, songs: Callable[..., None], database: Database
) -> None:
    songs((1, "POISON", "Ann", "la"))
    with database.get_connection() as connection:
        connection.execute(sa.text("DELETE FROM songs WHERE id = 2"))
    provider.control(poison=["POISON"])
    begin().export()
    fill(begin(), reembed="one")
    cached = begin().cache.open(FIRST)
    assert cached.rows["song_id"].to_list() == list(range(3, N_SONGS + 1))
    assert cached.deleted_rows(0.0)["song_id"].to_list() == [2]
    assert cached.rejected["song_id"].to_list() == [1]


def test_a_damaged_record_of_who_asked_is_named(begin: Begin) -> None:
    (begin().cache.storage.root / "reembed.json").write_text("{")
    with pytest.raises(StoreError, match=r"reembed\.json does not parse .*remove it"):
        begin().filler(reembed="one").fill_ranges([FIRST], lambda _: None)


@pytest.mark.parametrize("moment", ["add_written", "save", "delete_garbage"])
def test_a_death_after_the_last_answer_pays_nothing_more(
    begin: Begin, provider: Provider, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Before the new vectors are merged, when they are merged and not named, and before the old ones are removed."""

    def die(*_: object) -> None:
        raise SystemExit

    complete = completion.complete

    def complete_and_die(*given: Any) -> None:
        monkeypatch.setattr(CachedRange, moment, die)
        complete(*given)

    monkeypatch.setattr(completion, "complete", complete_and_die)
    with pytest.raises(SystemExit):
        begin().filler(reembed="one").fill_ranges([FIRST], lambda _: None)
    monkeypatch.undo()
    report, _ = fill(begin(), reembed="one")
    assert report.n_unchanged == N_SONGS
    assert set(sent(provider).values()) == {1}


def test_of_two_requests_at_once_none_is_lost(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process records its request between the reading and the writing of this one."""
    cache, put = begin().cache, LocalStorage.put_if_unchanged
    other = SongIdRange(100, 200)

    def put_after_another(*given: Any) -> str | None:
        monkeypatch.undo()
        assert reembedding.begin(cache.storage, [other], "another", [0]) == 1
        return put(*given)

    monkeypatch.setattr(LocalStorage, "put_if_unchanged", put_after_another)
    assert reembedding.begin(cache.storage, [FIRST], "one", [0]) == 2
    assert reembedding.begin(cache.storage, [other], "another", [0]) == 1
    reembedding.end(cache.storage, 1)
    assert reembedding.begin(cache.storage, [FIRST], "the same again", [0]) == 2, "it has not ended"
    assert reembedding.begin(cache.storage, [other], "again, when it has ended", [1]) == 3


def test_another_version_of_all_vectors_is_another_version_of_the_cache(begin: Begin) -> None:
    versions = [begin().cache.digest()]
    for asker in ("one", "another"):
        fill(begin(), reembed=asker)
        versions.append(begin().cache.digest())
    assert len(set(versions)) == 3


def test_nothing_is_spent_where_the_table_could_not_take_it(begin: Begin, provider: Provider) -> None:
    begin().load()
    other = begin()
    other.settings = other.settings.model_copy(update={"vector_type": "halfvec"})
    report, _ = fill(other, reembed="one")
    assert "expected" in str(report.error)
    assert sent(provider) == {}
    report, _ = fill(begin())
    assert (report.n_unchanged, sent(provider)) == (N_SONGS, {})
