"""How many lists searches visit."""

import pytest

from songvec_assets.vectors.index.probes import choose_probes, find_smallest


@pytest.mark.parametrize(
    ("lists", "n_rows", "probes"),
    [(1, 1, 1), (20, 400, 20), (100, 10_000, 100), (100, 10_001, 10), (1000, 1_000_000, 32), (1, 20_000, 1)],
)
def test_probes_are_all_lists_of_a_small_table_and_the_square_root_of_a_large_ones(
    lists: int, n_rows: int, probes: int
) -> None:
    assert choose_probes(lists, n_rows) == probes


@pytest.mark.parametrize("smallest", range(1, 65))
def test_the_smallest_probes_are_found_between_powers_of_two(smallest: int) -> None:
    tried: dict[int, bool] = {}

    def reaches(probes: int) -> bool:
        return tried.setdefault(probes, probes >= smallest)

    for power in range(7):
        reaches(2**power)
    assert find_smallest(reaches, set(tried), 64) == smallest
    assert len(tried) <= 7 + 5


def test_where_none_reaches_the_target_all_lists_are_visited() -> None:
    assert find_smallest(lambda _: False, {1, 2, 4, 5}, 5) == 5
