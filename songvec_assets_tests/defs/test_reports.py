"""Reports of the core as metadata: numbers with units, tables, and charts."""

import base64
import re
from dataclasses import replace

from songvec_assets.defs.charts import draw_recall, show_chart
from songvec_assets.defs.reports import describe_index
from songvec_assets_tests.defs.figures import RECALL, REPORT, open_picture


class TestMetadata:
    def test_an_index_is_shown_in_numbers_with_units_a_table_and_a_chart(self) -> None:
        shown = describe_index(REPORT)
        expected = {"built": True, "lists": 141, "probes": 3, "size (MB)": 10.0, "duration (s)": 12.346,
                    "recall (%)": 96.0, "target recall (%)": 95.0, "median search (ms)": 2.0,
                    "dagster/row_count": 20_000}  # fmt: skip
        assert {name: shown[name] for name in expected} == expected
        assert shown["memory for a build, estimated (MB)"] == round(REPORT.estimate.memory_bytes / 1e6, 1)
        records = [record.data for record in shown["recall and latency by probes"].records]
        assert [record["probes"] for record in records] == [1, 2, 3, 4]
        assert [record["chosen"] for record in records] == [False, False, True, False]
        assert records[2]["recall of rows (%)"] == 97.0
        assert records[2]["p99 (ms)"] == 6.0
        chart = show_chart(draw_recall(RECALL), "recall")
        encoded = re.fullmatch(r"!\[.+\]\(data:image/png;base64,(.+)\)", chart.md_str)
        assert encoded is not None
        open_picture(base64.b64decode(encoded[1]))

    def test_without_a_measurement_there_is_no_recall(self) -> None:
        shown = describe_index(replace(REPORT, recall=None))
        assert shown["reason"] == "there is none"
        assert not [name for name in shown if "recall" in name]
