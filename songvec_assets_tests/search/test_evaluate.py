"""How well searches answer labelled queries: by arithmetic, by every door, and before a swap."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app, base
from songvec_assets.errors import SearchError
from songvec_assets.pipeline import Pipeline
from songvec_assets.search.baseline import NAME
from songvec_assets.search.evaluate import evaluate
from songvec_assets.search.labels import LabelledQuery
from songvec_assets.search.measures import Interval
from songvec_assets.vectors.swap import drop_others
from songvec_assets_tests.administration import execute
from songvec_assets_tests.provider import Provider

TITLES = [LabelledQuery(f"Song {n}", {n: 1}, "titles") for n in range(1, 13)]
MODES = ["text", "vector", "hybrid", NAME]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Twelve titles, a query about no song, and a song that does not exist."""
    path = tmp_path / "queries.tsv"
    lines = [f"{query.words}\t{next(iter(query.grades))}\ttitles" for query in TITLES]
    path.write_text("\n".join([*lines, "something else\t7:2 999"]))
    return path


class TestArithmetic:
    """What was found is measured by slice and mode; hybrid is compared with the better of the two."""

    QUERIES = (LabelledQuery("a", {1: 2, 2: 1}, "one"), LabelledQuery("b", {3: 1}, "two"), LabelledQuery("c", {4: 1}))

    def test_scores_are_means_over_the_queries_of_a_slice(self) -> None:
        found = {
            "text": [[1, 2], [], [9, 4]],
            "vector": [[2, 1], [3], []],
            "hybrid": [[1, 2], [3], []],
            "other": [[], [], []],
        }
        result = evaluate(self.QUERIES, found, ["a note"])
        means = {
            (score.slice, score.mode): (score.n_queries, score.recall.mean, score.mrr.mean) for score in result.scores
        }
        assert [*dict.fromkeys(name for name, _ in means)] == ["all", "one", "two"]
        assert means["all", "text"] == pytest.approx((3, 2 / 3, 0.5))
        assert means["one", "vector"] == (1, 1.0, 1.0)
        assert means["two", "text"] == (1, 0.0, 0.0)
        assert means["all", "other"] == (3, 0.0, 0.0)
        assert [(each.slice, each.other) for each in result.verdicts] == [
            ("all", "vector"),
            ("one", "text"),
            ("two", "vector"),
        ]
        assert result.notes == ("a note",)
        assert len(result.answers) == 12
        assert result.answers[2].song_ids == (9, 4)
        assert result.answers[2].reciprocal_rank == 0.5

    def test_without_hybrid_there_is_nothing_to_compare(self) -> None:
        assert evaluate(self.QUERIES, {"vector": [[1], [3], [4]]}).verdicts == ()

    @pytest.mark.parametrize(
        ("hybrid", "words", "is_worse"),
        [
            ([1], "all: hybrid is as good as vector (nDCG@10 +0.000", False),
            ([9, 1], "all: hybrid is significantly worse than vector (nDCG@10 -0.369", True),
        ],
    )
    def test_a_sentence_says_which_is_better(self, hybrid: list[int], words: str, is_worse: bool) -> None:
        queries = [LabelledQuery(str(n), {1: 1}) for n in range(20)]
        lists = {"text": [[]] * 20, "vector": [[1]] * 20, "hybrid": [hybrid] * 20}
        [verdict] = evaluate(queries, lists).verdicts
        assert verdict.describe().startswith(words)
        assert verdict.is_worse == is_worse

    def test_a_difference_of_few_queries_is_not_significant(self) -> None:
        queries = [LabelledQuery(str(n), {1: 1}) for n in range(20)]
        lists = {"text": [[1]] * 20, "vector": [[]] * 20, "hybrid": [[9, 1], *[[1]] * 19]}
        [verdict] = evaluate(queries, lists).verdicts
        assert (verdict.other, verdict.is_worse) == ("text", False)
        assert "does not differ significantly from text" in verdict.describe()
        lists["vector"], lists["text"] = lists["hybrid"], [[]] * 20
        lists["hybrid"] = [[1]] * 20
        lists["vector"] = [[9, 1]] * 20
        [verdict] = evaluate(queries, lists).verdicts
        assert "is significantly better than vector" in verdict.describe()


class TestSearches:
    """Of sixty songs that a provider embedded: titles are found by their words, and by no vector of the test's."""

    def test_each_mode_is_measured_and_unknown_songs_are_named(
        self, pipeline: Pipeline, songs_provider: Provider, file: Path
    ) -> None:
        before = songs_provider.ledger()["requests"]
        result = pipeline.evaluate(file)
        # thirteen queries within two requests, after the probe
        assert songs_provider.ledger()["requests"] - before == 3
        scores = {(score.slice, score.mode): score for score in result.scores}
        assert [mode for name, mode in scores if name == "titles"] == MODES
        assert scores["titles", "text"].mrr == Interval(1.0, 1.0, 1.0)
        assert scores["titles", "hybrid"].ndcg.mean > scores["titles", "vector"].ndcg.mean
        assert scores["all", "text"].n_queries == 13
        assert scores["all", "text"].recall.mean == pytest.approx(12 / 13)
        assert "left out: 1 of 13 labelled song_ids are not in table songs (999)" in result.notes[0]
        assert pipeline.evaluate(TITLES).scores[0].n_queries == 12
        answer = next(each for each in result.answers if (each.query, each.mode) == ("Song 7", "vector"))
        assert list(answer.song_ids) == [hit.song_id for hit in pipeline.search("Song 7", 10)]

    def test_the_command_prints_a_table_of_80_columns_or_json(
        self, pipeline: Pipeline, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "make_pipeline", lambda: pipeline)
        monkeypatch.setenv("COLUMNS", "80")
        shown = CliRunner().invoke(app, ["evaluate", str(file)])
        assert shown.exit_code == 0, shown.output
        lines = shown.stdout.splitlines()
        assert max(map(len, lines)) <= 80
        rows = [line.split() for line in lines if line.split()[1:2] == ["text"]]
        assert [row[:3] for row in rows] == [["all", "text", "13"], ["titles", "text", "12"]]
        assert any(line.startswith("titles: hybrid ") for line in lines)
        printed = json.loads(CliRunner().invoke(app, ["evaluate", str(file), "--json"]).stdout)
        assert printed["scores"][0]["ndcg"]["mean"] <= 1
        assert len(printed["answers"]) == 13 * len(MODES)

    def test_without_labelled_queries_it_says_where_to_name_them(self, pipeline: Pipeline) -> None:
        with pytest.raises(SearchError, match="set SONGVEC_EVALUATION_QUERIES"):
            pipeline.evaluate()

    def test_what_cannot_be_searched_by_words_is_left_out(self, pipeline: Pipeline) -> None:
        url = pipeline.database.adbc_uri
        execute(url, "UPDATE pg_class SET reltuples = 60000 WHERE oid = 'songs'::regclass")
        try:
            result = pipeline.evaluate(TITLES)
        finally:
            execute(url, "ANALYZE songs")
        assert {score.mode for score in result.scores} == {"vector", NAME}
        assert result.notes[0].startswith("left out: text, hybrid: a search by words would read all of")


class TestSwaps:
    """Before a swap both tables answer the labelled queries of the settings."""

    @pytest.fixture
    def other(self, pipeline: Pipeline, file: Path) -> Callable[..., Pipeline]:
        def begin(**settings: Any) -> Pipeline:
            given = pipeline.settings.model_dump(exclude_none=True) | {"evaluation_queries": str(file)} | settings
            return Pipeline(type(pipeline.settings)(**given))

        return begin

    @pytest.mark.slow
    def test_both_figures_are_reported_and_a_fall_is_a_warning(self, other: Callable[..., Pipeline]) -> None:
        with other() as songs:
            report = songs.swap(dimensions=32)
            quality = report.load.comparison.quality
            assert (quality.n_queries, quality.trouble) == (13, "")
            assert 0 <= quality.staged <= 1
            assert f"{quality.staged:.3f}, before: {quality.serving:.3f}" in report.load.comparison.describe()
            measured = {score.mode: score for score in songs.evaluate().scores if score.slice == "all"}
            assert measured["vector"].ndcg.mean == pytest.approx(quality.staged)
            drop_others(songs.database)
            assert songs.swap(dimensions=64).load.comparison.quality.serving == pytest.approx(quality.staged)
            drop_others(songs.database)

    @pytest.mark.slow
    def test_a_model_that_no_longer_answers_is_a_warning_and_stops_no_swap(
        self, other: Callable[..., Pipeline], songs_provider: Provider
    ) -> None:
        with other(embedding_model="another") as songs:
            songs_provider.control(model="another")
            try:
                quality = songs.swap().load.comparison.quality
            finally:
                songs_provider.control()
            assert "could not be compared" in quality.warning
            assert songs.table.spec.model == "another"
            drop_others(songs.database)

    def test_a_bad_file_is_refused_before_anything_is_paid_for(
        self, other: Callable[..., Pipeline], songs_provider: Provider, file: Path
    ) -> None:
        file.write_text("no songs here\n")
        before = songs_provider.ledger()["requests"]
        with other() as songs, pytest.raises(SearchError, match="line 1: expected song_ids"):
            songs.swap(dimensions=16)
        assert songs_provider.ledger()["requests"] == before
