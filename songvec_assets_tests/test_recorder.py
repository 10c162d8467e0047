"""What the steps of runs leave: totals that add up over runs, and a file that is always whole and true."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from songvec_assets.errors import BudgetExceededError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider


@pytest.fixture
def begin(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path
) -> Callable[..., Pipeline]:
    """A run over three songs in two ranges, which writes its metrics; each call is a new one."""
    songs((1, "Sea", "Ann", "waves and salt"), (2, "Hill", "Ben", "stones"), (150, "Moon", "Cy", "a silver light"))
    given = {"metrics_textfile": str(tmp_path / "songvec.prom"), "usd_per_million_tokens": 1e6}
    return lambda **settings: make_pipeline(database, provider, tmp_path / "store", **given | settings)


def read_file(folder: Path) -> dict[str, float]:
    """The samples of the file, by name and labels."""
    families = text_string_to_metric_families((folder / "songvec.prom").read_text())
    samples = (sample for family in families for sample in family.samples)
    return {" ".join([each.name.removeprefix("songvec_"), *each.labels.values()]): each.value for each in samples}


def test_each_step_adds_and_the_file_has_all_of_it(
    begin: Callable[..., Pipeline], songs: Callable[..., None], tmp_path: Path
) -> None:
    begin().export()
    begun = read_file(tmp_path)
    assert (begun["ranges behind"], begun["songs missing"], begun["embedded_songs_total"]) == (2, 3, 0)
    begin().run()
    first = read_file(tmp_path)
    assert (first["ranges loaded"], first["songs loaded"], first["rows_written_total"]) == (2, 3, 3)
    assert (first["embedded_songs_total"], first["recall_ratio"]) == (3, 1)
    assert first["embedded_tokens_total"] <= first["spent_dollars_total"] <= first["embedded_tokens_total"] + 10, (
        "a token costs a dollar; probes are no songs"
    )
    assert first["month_spent_dollars month"] == first["spent_dollars_total"]
    songs((3, "Dune", "Dee", "sand"))
    begin().run()
    again = read_file(tmp_path)
    assert (again["embedded_songs_total"], again["rows_written_total"], again["songs loaded"]) == (4, 4, 4)
    assert [path.name for path in tmp_path.glob("*.prom*")] == ["songvec.prom"], "no half of a file is left"


def test_a_run_with_nothing_to_do_writes_the_file_and_no_row(
    begin: Callable[..., Pipeline], database: Database, tmp_path: Path
) -> None:
    begin().run()
    before = execute(database.adbc_uri, "SELECT key, value, xmin::text FROM songvec.settings ORDER BY key")
    (tmp_path / "songvec.prom").unlink()
    begin().run()
    assert read_file(tmp_path)["songs loaded"] == 3
    assert execute(database.adbc_uri, "SELECT key, value, xmin::text FROM songvec.settings ORDER BY key") == before


def test_what_a_failed_run_was_billed_counts(
    begin: Callable[..., Pipeline], provider: Provider, tmp_path: Path
) -> None:
    begin().export()
    with pytest.raises(BudgetExceededError):
        begin(max_usd=16.0, max_request_texts=1, concurrency=1).embed()
    found = read_file(tmp_path)
    assert 0 < found["embedded_songs_total"] < 3


def test_answers_of_429_count(begin: Callable[..., Pipeline], provider: Provider, tmp_path: Path) -> None:
    provider.control(statuses=[{"status": 429, "count": 1, "after": 2}])
    begin().run()
    found = read_file(tmp_path)
    assert found["provider_rate_limited_total"] == 1
    assert found["quota_speed_ratio"] < 1


def test_a_file_that_cannot_be_written_is_a_warning_and_ends_no_run(
    begin: Callable[..., Pipeline], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(metrics_textfile=str(tmp_path / "missing" / "songvec.prom")).run()
    assert "SONGVEC_METRICS_TEXTFILE cannot be written" in caplog.text


def test_a_run_without_the_file_does_not_load_the_library() -> None:
    code = "import sys; from songvec_assets import Pipeline; from songvec_assets.defs import steps; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "songvec_assets.recorder" in loaded
    assert "prometheus_client" not in loaded
