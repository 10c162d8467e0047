"""Songs that are embedded again because a person asked for it: once for each who asks, and resumable as any fill."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from songvec_assets.cache.fill import FillReport
from songvec_assets.cache.shards import load_embeddings_from_cache
from songvec_assets.deployment import Deployment
from songvec_assets.errors import BudgetExceededError, DamagedShardError, SongvecError
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets_tests.conftest import deploy
from songvec_assets_tests.provider import Provider, running_provider

N_SONGS = 30
FIRST = SongIdRange(0, 100)
Begin = Callable[..., Deployment]


@pytest.fixture(scope="module")
def server() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


@pytest.fixture
def begin(database: Database, server: Provider, songs: Callable[..., None], tmp_path: Path) -> Begin:
    """Begins a run over a store that has all songs embedded already."""
    server.control()
    songs(*((song_id, f"Song {song_id}", "Ann", "la") for song_id in range(1, N_SONGS + 1)))

    def begin(**settings: object) -> Deployment:
        return deploy(database, server, tmp_path, max_request_texts=5, usd_per_million_tokens=1e6, **settings)

    deployment = begin()
    deployment.export()
    fill(deployment)
    server.reset_ledger()
    return begin


def fill(deployment: Deployment, anew: str | None = None) -> tuple[FillReport, SongvecError | None]:
    """Fill the first range."""
    reports: list[FillReport] = []
    try:
        deployment.filler(anew=anew).fill_ranges([FIRST], reports.append)
    except SongvecError as error:
        return reports[0], error
    return reports[0], None


def sent(server: Provider) -> dict[str, int]:
    """How often each song's text was billed since."""
    return {text: count for text, count in server.texts().items() if text != "probe"}


def test_each_text_is_paid_for_again_and_again_only_for_another_who_asks(begin: Begin, server: Provider) -> None:
    report, _ = fill(begin(), anew="one")
    assert (report.n_embedded, report.n_reused) == (N_SONGS, 0)
    assert set(sent(server).values()) == {1}
    report, _ = fill(begin(), anew="one")
    assert report.n_unchanged == N_SONGS
    assert set(sent(server).values()) == {1}
    fill(begin(), anew="another")
    assert set(sent(server).values()) == {2}
    fill(begin())
    assert set(sent(server).values()) == {2}


def test_what_was_stopped_in_the_middle_goes_on_without_asking_again(begin: Begin, server: Provider) -> None:
    few = begin(max_usd=80)
    _, error = fill(few, anew="one")
    assert isinstance(error, BudgetExceededError)
    assert 0 < len(sent(server)) < N_SONGS
    fill(begin())
    assert sent(server).keys() == {f"Song {song_id} by Ann\nla" for song_id in range(1, N_SONGS + 1)}
    assert set(sent(server).values()) == {1}
    live = load_embeddings_from_cache(begin().cache, FIRST)[1]
    assert live.filter(pl.col("reason").is_null()).height == N_SONGS


def test_a_load_in_between_is_refused_and_the_table_keeps_its_rows(begin: Begin) -> None:
    begin().publish()
    fill(begin(max_usd=80), anew="one")
    with pytest.raises(DamagedShardError, match="materialize embedding_cache"):
        begin().publish()
    assert sum(load.n_rows for load in _publish_after(begin)) == N_SONGS


def _publish_after(begin: Begin) -> list:
    fill(begin())
    return begin().publish().loads


def test_nothing_is_spent_where_the_table_could_not_take_it(begin: Begin, server: Provider) -> None:
    begin().publish()
    other = begin()
    other.settings = replace(other.settings, vector_type="halfvec")
    report, _ = fill(other, anew="one")
    assert "expected" in str(report.error)
    assert sent(server) == {}
    report, _ = fill(begin())
    assert (report.n_unchanged, sent(server)) == (N_SONGS, {})
