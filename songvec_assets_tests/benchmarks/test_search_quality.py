"""The queries of the search benchmark are divided once and for all, with every slice in both halves."""

from collections import Counter

from benchmarks.search_quality import divide, render
from songvec_assets.samples import read_sample_queries
from songvec_assets.search.evaluate import evaluate
from songvec_assets.search.labels import LabelledQuery


def test_each_half_has_queries_of_each_slice() -> None:
    rows = read_sample_queries().select("slice", "query").unique(maintain_order=True).iter_rows()
    queries = [LabelledQuery(words, {1: 1}, kind) for kind, words in rows]
    halves = divide(queries)
    sizes = [Counter(query.slice for query in half) for half in halves.values()]
    assert sum(sizes, Counter()) == Counter(query.slice for query in queries)
    assert all(min(each.values()) >= 10 and len(each) == 5 for each in sizes)


def test_the_table_has_a_row_per_slice_and_mode() -> None:
    found = evaluate([LabelledQuery("a", {1: 1}, "one")], {"text": [[1]], "vector": [[]], "hybrid": [[1]]}, ["a note"])
    table = render("judged on", found).splitlines()
    assert table[2] == "| all | text | 1 | 1.000 (1.000–1.000) | 1.000 (1.000–1.000) | 1.000 (1.000–1.000) |"
    assert len(table) == 2 + 2 * 3 + 1 + 2 + 1
