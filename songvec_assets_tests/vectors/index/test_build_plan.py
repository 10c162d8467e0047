"""Whether an index is built, and why."""

import pytest

from songvec_assets.vectors.index.build_plan import reason_to_build


class TestReason:
    @pytest.mark.parametrize(
        ("n_rows", "lists", "lists_now", "n_changed", "reason"),
        [
            (400, 20, None, 0, "there is none"),
            (400, 20, 20, 0, None),
            (400, 20, 20, 80, None),
            (400, 20, 20, 81, "81 rows changed since it was built, over a fifth of 400"),
            (625, 25, 20, 100, None),
            (676, 26, 20, 100, "676 rows want 26 lists, it has 20"),
            (225, 15, 20, 10, None),
            (196, 14, 20, 10, "196 rows want 14 lists, it has 20"),
            (12_000_000, 3464, 3464, 2_500_000,
             "2,500,000 rows changed since it was built, over a fifth of 12,000,000"),
        ],
    )  # fmt: skip
    def test_it_is_built_when_there_is_none_or_lists_or_changes_are_far_off(
        self, n_rows: int, lists: int, lists_now: int | None, n_changed: int, reason: str | None
    ) -> None:
        assert reason_to_build(n_rows, lists, lists_now, n_changed) == reason

    def test_lists_that_a_person_set_are_to_be_just_those(self) -> None:
        assert reason_to_build(400, 21, 20, 0) is None
        assert reason_to_build(400, 21, 20, 0, exact=True) == "400 rows want 21 lists, it has 20"
