"""Whether the texts or the server are at fault, by counts of the last minute."""

import pytest

from songvec_assets.embedding.health import MAX_BAD_TEXTS, MAX_KNOWN_TEXTS, WINDOW_S, ServerHealth


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(health: ServerHealth, n_texts: int) -> None:
    for number in range(n_texts):
        health.count_bad(b"%d" % number)


@pytest.mark.parametrize(
    ("n_good", "n_bad", "is_failing"),
    [(0, MAX_BAD_TEXTS, False), (0, MAX_BAD_TEXTS + 1, True), (1000, 10, False), (1000, 11, True), (100, 3, False)],
)
def test_it_is_at_fault_for_more_bad_texts_than_a_few_and_than_one_in_a_hundred(
    clock: Clock, n_good: int, n_bad: int, is_failing: bool
) -> None:
    health = ServerHealth(clock)
    health.count_good(n_good)
    fail(health, n_bad)
    assert (health.n_bad, health.n_texts, health.is_failing()) == (n_bad, n_good + n_bad, is_failing)


def test_a_text_that_fails_again_is_one_text(clock: Clock) -> None:
    health = ServerHealth(clock)
    for _ in range(10):
        fail(health, 2)
    assert (health.n_bad, health.is_failing()) == (2, False)


def test_what_is_a_minute_old_does_not_count(clock: Clock) -> None:
    health = ServerHealth(clock)
    health.count_good(50)
    fail(health, 5)
    clock.now = WINDOW_S / 2
    health.count_good(7)
    clock.now = WINDOW_S + 1
    assert (health.n_bad, health.n_texts, health.is_failing()) == (0, 7, False)
    assert health.last_good_at == WINDOW_S / 2


def test_texts_of_earlier_runs_count_as_good_up_to_a_number(clock: Clock) -> None:
    """A rerun sends only what failed before: all of it may fail again."""
    health = ServerHealth(clock)
    for _ in range(3):
        health.count_known(MAX_KNOWN_TEXTS)
    fail(health, 100)
    assert (health.n_texts, health.is_failing()) == (MAX_KNOWN_TEXTS + 100, False)
    fail(health, 102)
    assert health.is_failing()
