"""How many lists searches visit."""

import pytest

from songvec_assets.vectors.index.probes import find_smallest


@pytest.mark.parametrize("smallest", range(1, 65))
def test_the_smallest_probes_are_found_between_powers_of_two_within_an_eighth(smallest: int) -> None:
    tried: dict[int, bool] = {}

    def reaches(probes: int) -> bool:
        return tried.setdefault(probes, probes >= smallest)

    for power in range(7):
        reaches(2**power)
    assert smallest <= find_smallest(reaches, set(tried), 64) <= max(smallest, smallest * 9 // 8)
    assert len(tried) <= 7 + 3


def test_where_none_reaches_the_target_all_lists_are_visited() -> None:
    assert find_smallest(lambda _: False, {1, 2, 4, 5}, 5) == 5


def test_more_are_tried_if_none_of_those_that_were_reaches_the_target() -> None:
    assert find_smallest(lambda probes: probes >= 12, {1, 2, 4, 8}, 20) in (12, 13)


def test_those_above_the_smallest_are_not_asked_for() -> None:
    asked: list[int] = []
    find_smallest(lambda probes: asked.append(probes) or probes >= 3, {1, 2, 4, 8, 16}, 16)
    assert max(asked) == 4
