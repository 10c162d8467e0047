"""Songs that the provider gives no vector for: rejected with the reason, unless the server is at fault."""

import numpy as np

from songvec_assets.cache.rejections import MAX_REFUSALS_IN_A_ROW
from songvec_assets.errors import (
    ProviderError,
)
from songvec_assets_tests.cache.filling import (
    FIRST,
    Run,
    Songs,
    assert_stored,
    billed,
    fill,
    plain_songs,
    plain_texts,
    stored,
    try_fill,
)
from songvec_assets_tests.provider import Provider, vector_of


def test_a_poison_song_is_rejected_with_its_reason_and_its_neighbours_are_paid_once(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 41)), (17, "POISON", "Ann", "x"), (18, "Two", "POISON", "x"), (40, "N", "A", "POISON"))
    provider.control(poison=["POISON"])
    pipeline = run(max_request_texts=32)
    (report,) = fill(pipeline)
    assert (report.n_songs, report.n_embedded, report.n_rejected) == (40, 37, 3)
    assert sorted(song_id for song_id, _ in report.rejected) == [17, 18, 40]
    assert all("400" in reason and "content filter" in reason for _, reason in report.rejected)
    found = stored(pipeline)
    assert {song_id for song_id, answer in found.items() if isinstance(answer, str)} == {17, 18, 40}
    assert found[17] == dict(report.rejected)[17]
    neighbours = plain_texts(sorted(set(range(1, 40)) - {17, 18}))
    assert billed(provider) == dict.fromkeys(neighbours.values(), 1)
    for song_id, text in neighbours.items():
        np.testing.assert_allclose(found[song_id], vector_of(text, 64), atol=1e-6)


def test_a_refused_song_is_sent_again_only_when_its_text_changes(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 9)), (5, "POISON", "Ann", "x"))
    provider.control(poison=["POISON"])
    fill(run())
    provider.reset_ledger()
    (report,) = fill(run())
    assert (report.n_unchanged, report.n_rejected, report.rejected) == (7, 1, [])
    assert provider.ledger()["requests"] == 0
    songs((5, "Cured", "Ann", "x"))
    last = run()
    (report,) = fill(last)
    assert (report.n_changed, report.n_embedded, report.n_rejected) == (1, 1, 0)
    assert billed(provider) == {"Cured by Ann\nx": 1}
    assert_stored(last, plain_texts(range(1, 9)) | {5: "Cured by Ann\nx"})


def test_a_song_that_becomes_poison_loses_its_old_vector(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 9)))
    provider.control(poison=["POISON"])
    fill(run())
    songs((5, "POISON", "Ann", "x"))
    last = run()
    (report,) = fill(last)
    assert (report.n_changed, report.n_rejected, report.n_embedded) == (1, 1, 0)
    assert isinstance(stored(last)[5], str)


def test_all_songs_of_a_refused_text_are_rejected(songs: Songs, run: Run, provider: Provider) -> None:
    songs((1, "POISON", "Ann", "x"), (2, "Sea", "Ann", "x"), (3, "POISON", "Ann", "x"))
    provider.control(poison=["POISON"])
    (report,) = fill(run())
    assert report.n_rejected == 2
    assert sorted(song_id for song_id, _ in report.rejected) == [1, 3]


def test_too_many_refusals_in_a_row_end_the_run(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 61)), *plain_songs(range(101, 103)))
    provider.control(poison=["Song"])
    reports, error = try_fill(run())
    assert type(error) is ProviderError
    assert "refused" in str(error)
    assert "content filter" in str(error)
    assert [report.range for report in reports] == [FIRST], "the next range is not tried"
    assert reports[0].error is error
    assert provider.ledger()["requests_by_status"]["400"] < 3 * MAX_REFUSALS_IN_A_ROW


def test_a_provider_that_refuses_all_songs_and_a_plain_text_too_sets_no_song_aside(
    songs: Songs, run: Run, provider: Provider
) -> None:
    song_ids = [*range(1, 6), *range(101, 106)]
    songs(*plain_songs(song_ids))
    provider.control(statuses=[{"status": 400, "after": 2}])
    _, error = try_fill(run())
    assert type(error) is ProviderError
    assert "so is a plain one" in str(error)
    assert stored(run()) == {}
    provider.control()
    pipeline = run()
    fill(pipeline)
    assert_stored(pipeline, plain_texts(song_ids))


def test_refusals_are_counted_over_ranges(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs([start + song_id for start in range(0, 600, 100) for song_id in range(10)]))
    provider.control(poison=["Song"])
    reports, error = try_fill(run())
    assert type(error) is ProviderError
    assert f"{MAX_REFUSALS_IN_A_ROW} texts in a row" in str(error)
    assert len(stored(run())) <= MAX_REFUSALS_IN_A_ROW
    assert len(reports) < 6


def test_songs_that_were_refused_for_no_fault_of_theirs_are_sent_again(
    songs: Songs, run: Run, provider: Provider
) -> None:
    """The run ended because the fault was found not to be the songs': none of them may stay rejected for it."""
    songs(*plain_songs(range(1, 61)))
    provider.control(poison=["Song"])
    _, error = try_fill(run())
    assert isinstance(error, ProviderError)
    provider.control()
    last = run()
    fill(last)
    assert_stored(last, plain_texts(range(1, 61)))


def test_many_refused_songs_between_good_ones_do_not_end_the_run(songs: Songs, run: Run, provider: Provider) -> None:
    n_poison = 2 * MAX_REFUSALS_IN_A_ROW // 2 + 10
    bad = list(range(1, 2 * n_poison, 2))
    songs(*plain_songs(range(1, 2 * n_poison)), *((song_id, f"POISON {song_id}", "Ann", "x") for song_id in bad))
    provider.control(poison=["POISON"])
    (report,) = fill(run(max_request_texts=16))
    assert report.n_rejected == n_poison > MAX_REFUSALS_IN_A_ROW
    assert report.n_embedded == n_poison - 1
