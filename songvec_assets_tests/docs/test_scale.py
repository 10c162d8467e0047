"""docs/scale.md holds what its formulas give, and these are the package's own."""

import pytest

from benchmarks.scale import CASES, PAGE, update, work_out
from songvec_assets.vectors.index.sizing import kmeans_bytes


def test_the_page_holds_what_its_formulas_give() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert update(page) == page


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_is_what_a_build_is_given(case: object) -> None:
    names = case.names()  # type: ignore[attr-defined]
    expected = kmeans_bytes(int(names["L"]), int(names["d"]), case.vector_type)  # type: ignore[attr-defined]
    assert work_out(case)["memory"] == pytest.approx(expected, rel=0.01)  # type: ignore[arg-type]
