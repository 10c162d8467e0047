"""The report of a measurement, what it says and how long it holds."""

from dataclasses import replace

import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.index.recall import RecallReport, read_recall, write_recall
from songvec_assets.vectors.index.recall_searches import RecallPoint
from songvec_assets.vectors.table import SERVING, VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.vectors.conftest import load, put
from songvec_assets_tests.vectors.indexes import build_index, fill


class TestReport:
    POINTS = tuple(
        RecallPoint(probes, recall, recall - 0.02, recall + 0.01, 80, recall, recall, 1.0, 2.0)
        for probes, recall in ((1, 0.5), (2, 0.96))
    )
    REPORT = RecallReport(400, 400, 0.95, POINTS, 2, 7, 1.5, is_cut_short=False)
    WORDS = "recall 96.0% at 2 probes (95% interval 94.0% to 97.0%, 80 queries)"

    def test_it_comes_back_from_the_settings_as_it_was(self, database: Database) -> None:
        report = self.REPORT
        with database.get_connection() as connection:
            write_recall(connection, VectorTable(database), report)
            assert read_recall(connection, VectorTable(database)) == report
            assert VectorTable(database).read_probes(connection) == 2
        assert (report.recall, report.reached) == (0.96, True)

    def test_what_is_in_doubt_is_said(self) -> None:
        for change, words in (
            ({"target": 0.94}, self.WORDS),
            ({}, f"{self.WORDS}, it may be as low as 94.0%, under the target of 95%"),
            ({"target": 0.99}, f"{self.WORDS}, under the target of 99%"),
            ({"n_read": 40, "target": 0.94}, f"{self.WORDS[:-1]} against a sample of 40 rows)"),
            (
                {"target": 0.94, "is_cut_short": True, "seconds": 15.2},
                f"{self.WORDS}, measuring ended at its time limit, after 15 s",
            ),
        ):
            assert replace(self.REPORT, **change).describe() == words

    @pytest.mark.parametrize(("n_changed", "holds"), [(7, True), (11, True), (12, False)])
    def test_it_holds_until_over_a_hundredth_of_the_rows_changed(self, n_changed: int, holds: bool) -> None:
        assert self.REPORT.holds(n_changed) is holds

    @pytest.mark.parametrize(
        ("n_queries", "is_cut_short", "holds"), [(6, True, False), (6, False, True), (20, True, True)]
    )
    def test_it_does_not_hold_if_the_time_was_up_before_anything_was_known(
        self, n_queries: int, is_cut_short: bool, holds: bool
    ) -> None:
        points = tuple(replace(point, n_queries=n_queries) for point in self.POINTS)
        report = replace(self.REPORT, points=points, is_cut_short=is_cut_short)
        assert report.holds(report.n_changed) is holds


def test_rows_put_past_the_cache_are_not_measured(database: Database, cache: ModelCache) -> None:
    put(cache, range(10))
    load(database, cache)
    execute(database.adbc_uri, "DELETE FROM songvec.loaded_ranges")
    fill(database, 100, 200)
    report = build_index(database, cache)
    assert report.built
    assert report.recall is None
    assert f"holds 0 of the 0 rows that the ledger of table {SERVING} names" in report.reason
