"""How many requests may be in flight: pure arithmetic of the window; whole runs against real servers test the rest."""

import pytest

from songvec_assets.embedding.gate import FIRST, MAX_ANSWER_BYTES, InFlightWindow

SMALL = 1_000


def answered(n: int, seconds: float = 1.0, n_bytes: int = SMALL, highest: int = 32) -> InFlightWindow:
    """A window after so many answers, of tries that may take 100 s each."""
    window = InFlightWindow(highest)
    for _ in range(n):
        window.count_answer(seconds, 100.0, n_bytes)
    return window


def test_the_window_doubles_per_round_of_quick_answers_up_to_its_maximum() -> None:
    assert [answered(n).n_allowed for n in (0, FIRST, 3 * FIRST, 100)] == [FIRST, 2 * FIRST, 4 * FIRST, 32]


def test_slower_answers_add_one_per_round_and_slow_ones_none() -> None:
    assert answered(FIRST, seconds=30.0).n_allowed == FIRST
    assert answered(FIRST + 1, seconds=30.0).n_allowed == FIRST + 1
    assert answered(100, seconds=60.0).n_allowed == FIRST


def test_a_time_out_halves_it_once_for_all_that_were_in_flight_together() -> None:
    window = answered(100)
    for _ in range(5):
        window.count_timeout(sent_at=1.0, now=60.0)
    assert (window.n_allowed, window.stretch) == (16, 2.0)
    window.count_timeout(sent_at=61.0, now=120.0)
    assert (window.n_allowed, window.stretch) == (8, 4.0)
    window.count_answer(1.0, 100.0, SMALL)
    assert (window.n_allowed, window.stretch) == (8, 2.0)


@pytest.mark.parametrize(("n_bytes", "n_allowed"), [(42 << 20, 18), (22 << 20, 32), (1 << 30, 1)])
def test_large_answers_must_fit_into_memory_together(n_bytes: int, n_allowed: int) -> None:
    window = answered(100, n_bytes=n_bytes)
    assert window.n_allowed == n_allowed
    assert window.n_allowed * n_bytes <= max(MAX_ANSWER_BYTES, n_bytes)
    window.count_answer(1.0, 100.0, SMALL)
    assert window.n_allowed == n_allowed, "the next large one may come at any time"
