"""Each job by its own command, typed in a fresh project folder; exit codes that scripts can use."""

import json

import pytest

from songvec_assets_tests.cli.test_commands import FIRST, N_SAMPLES, OF_DEMO, Project, project

pytestmark = pytest.mark.slow

__all__ = ["project"]


def test_a_refresh_is_planned_embedded_loaded_indexed_and_verified_step_by_step(project: Project) -> None:
    code, output = project.run("songvec", "run", "--dry-run")
    assert (code, f"{N_SAMPLES} songs in Postgres" in output, "nothing is cached yet" in output) == (0, True, True), (
        output
    )
    code, output = project.run("songvec", "embed")
    assert (code, "embedding_cache" in output, "song_embeddings_table" in output) == (0, True, False), output
    assert project.materialized_partitions(".songvec/dagster") == OF_DEMO
    code, output = project.run("songvec", "status", "--json")
    told = json.loads(output)
    assert (code, told["total"]["n_cached"], told["missing"]) == (3, N_SAMPLES, N_SAMPLES), "3: songs are missing"
    code, output = project.run("songvec", "run", "--dry-run")
    assert f"load: {N_SAMPLES} of {N_SAMPLES} rows cached so far are to be written" in output
    code, output = project.run("songvec", "load")
    assert code == 0, output
    code, output = project.run("songvec", "verify")
    assert (code, "Check index_is_used did not pass" in output) == (3, True), output
    code, output = project.run("songvec", "index")
    assert code == 0, output
    code, output = project.run("songvec", "verify")
    assert (code, "recall_reaches_target: recall 100.0% at" in output) == (0, True), output
    code, output = project.run("songvec", "status")
    assert code == 0, output
    for words in ("Spent this month: $0.0000", "recall 100.0% at", "Table song_embeddings: vector(512) by demo-v2"):
        assert words in output


def test_jobs_run_by_dagsters_own_command_without_a_flag_and_without_partitions(project: Project) -> None:
    code, output = project.run("dagster", "job", "execute", "-j", "refresh")
    assert (code, "RUN_SUCCESS" in output) == (0, True), output
    assert FIRST in project.materialized_partitions()
    code, output = project.run("dagster", "job", "execute", "-j", "verify")
    assert (code, "RUN_SUCCESS" in output) == (0, True), output


def test_an_index_is_rebuilt_on_request(project: Project) -> None:
    (project.folder / "Makefile").touch()
    code, output = project.run("songvec", "demo")
    assert (code, "Next: make dev shows this run" in output) == (0, True), output
    code, output = project.run("songvec", "run")
    assert (code, "build index" in output) == (0, False), "it fits"
    code, output = project.run("songvec", "index")
    assert (code, "build index: 100%" in output) == (0, True), output
