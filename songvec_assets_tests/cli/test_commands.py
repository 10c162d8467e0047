"""The commands of the README, typed in a fresh project folder: real processes, real database, real provider.

The first `songvec demo`, and Dagster's commands that need nothing but what a clone and its environment give them, start
from nothing; the others are forked from a process that has loaded the libraries.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from songvec_assets.defs.steps import GRACE_S
from songvec_assets.postgres.embedded import create_songs_table
from songvec_assets.postgres.engine import Database
from songvec_assets.samples import read_sample_songs
from songvec_assets.settings import variables
from songvec_assets_tests.administration import wait_until
from songvec_assets_tests.processes import send_signal
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.warm import WarmProcess
from songvec_assets_tests.warm import start as start_warm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FIRST = "000000000-000050000"
OF_DEMO = {FIRST, "000050000-000100000", "000100000-000150000", "000150000-000200000"}
"""The ranges that hold the samples in the embedded database."""
N_SAMPLES = read_sample_songs().height
N_TEXTS, N_AT_ONCE = 4, 4
"""Of a request to a provider, and requests in flight."""
SET_AT_START = dict.fromkeys(
    ("DAGSTER_CLI_ASSET_MATERIALIZE_MODULE_NAME", "DAGSTER_CLI_JOB_EXECUTE_MODULE_NAME"), "songvec_assets.definitions"
)
"""By `songvec_assets.pth`, in every process that starts from nothing."""
MISLEADING = "POSTGRES_URL=postgresql://nobody@localhost:1/none\nSONGVEC_WEBHOOK_URL_FILE=/nowhere\n"
"""A `.env` that the demo must not look at."""


class Project:
    """A folder as a clone has it, with its own instance, store and embedded database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("pyproject.toml", "workspace.yaml", "dagster.yaml"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "songvec_assets").symlink_to(ROOT / "songvec_assets")
        dropped = {*variables(), "DAGSTER_HOME", *SET_AT_START}
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "200"}

    def start(self, *command: str, cold: bool | None = None, **settings: str) -> "subprocess.Popen[str] | WarmProcess":
        """Type a command; leave it running. It starts from nothing where `cold`; None: where it is Dagster's."""
        environment = self.environment | settings
        if not (command[0] != "songvec" if cold is None else cold):
            return start_warm([str(BIN / command[0]), *command[1:]], self.folder, SET_AT_START | environment)
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, *command: str, cold: bool | None = None, **settings: str) -> tuple[int, str]:
        """Type a command and wait: exit code and output."""
        process = self.start(*command, cold=cold, **settings)
        try:
            output, _ = process.communicate(timeout=150)
        finally:
            process.kill()  # left running, it would be the failure of a later test
            process.wait()
        assert process.returncode is not None
        return process.returncode, output

    def materialized_partitions(self, home: str = ".dagster") -> set[str]:
        """What an instance of the project remembers of the cache."""
        with sqlite3.connect(self.folder / home / "history" / "runs" / "index.db") as instance:
            rows = instance.execute(
                "SELECT DISTINCT partition FROM event_logs WHERE dagster_event_type = 'ASSET_MATERIALIZATION' "
                "AND asset_key = '[\"embedding_cache\"]'"
            )
            return {partition for (partition,) in rows}


@contextlib.contextmanager
def fresh_project() -> Iterator[Project]:
    # not below pytest's folder: the embedded server's user must be able to reach it
    with tempfile.TemporaryDirectory(prefix="songvec-project-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Project(Path(folder))


@pytest.fixture
def project() -> Iterator[Project]:
    with fresh_project() as project:
        yield project


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Project, str]]:
    """A project after its first `songvec demo`, and what that said. A test leaves the tables as the demo does."""
    with fresh_project() as project:
        (project.folder / ".env").write_text(MISLEADING)
        code, output = project.run("songvec", "demo", cold=True, FIREWORKS_API_KEY="never-used")
        assert code == 0, output
        (project.folder / ".env").unlink()
        yield project, output


@pytest.fixture
def holding_provider(provider: Provider) -> Provider:
    """Answers the probe and three requests, and holds all others until `control`; then they still take a second."""
    provider.control(latency_s=1.0, hold_after=4)
    return provider


def provider_settings(provider: Provider) -> dict[str, str]:
    """The environment of somebody with a key and a provider of their own."""
    return {
        "FIREWORKS_API_KEY": provider.api_key,
        "FIREWORKS_BASE_URL": provider.base_url,
        "SONGVEC_TOKENS_PER_MINUTE": "1000000000",
        "SONGVEC_MAX_REQUEST_TEXTS": str(N_TEXTS),
        "SONGVEC_CONCURRENCY": str(N_AT_ONCE),
    }


def wait_until_held(provider: Provider) -> None:
    """Until as many requests as `provider_settings` allow are in flight: the run can neither go on nor end."""
    wait_until(lambda: provider.ledger()["texts_billed"] == 1 + 3 * N_TEXTS)
    wait_until(lambda: provider.count_in_flight() == N_AT_ONCE)


@pytest.mark.timeout(600)
def test_materialize_and_dg_commands_work_with_no_flag_beyond_the_readme(project: Project) -> None:
    code, output = project.run("dagster", "asset", "materialize", "--select", "song_embeddings_table")
    assert code != 0
    assert "fill the cache first, with `songvec run`" in output
    code, output = project.run(
        *("dagster", "asset", "materialize", "--select", "*", "--partition-range", f"{FIRST}...000050000-000100000"),
        cold=True,
    )
    assert (code, "RUN_SUCCESS" in output) == (0, True), output
    assert project.materialized_partitions() >= {FIRST}
    code, output = project.run("dagster", "asset", "materialize", "--select", "song_embeddings_table")
    assert (code, "RUN_SUCCESS" in output) == (0, True), output
    code, output = project.run("dg", "launch", "--assets", "*", "--partition-range", f"{FIRST}...{FIRST}")
    assert (code, "RUN_SUCCESS" in output) == (0, True), output
    code, output = project.run("dg", "check", "defs")
    assert code == 0, output


def test_the_demo_ends_in_search_results_and_embeds_nothing_the_second_time(demo: tuple[Project, str]) -> None:
    project, output = demo
    assert re.search(rf"embedding_cache\s+{N_SAMPLES}\s+\S+\s+0\s+\$0.0000\s+0\s+{N_SAMPLES}\s+0", output), output
    assert "DEMO vectors (demo-v2: a small model" in output
    for song in ("Steerage Ticket", "Freewheel", "Le mani di nonna Ines"):
        assert song in output
    assert project.materialized_partitions(".songvec/dagster") == OF_DEMO
    assert not (project.folder / ".dagster").exists(), "the project's own instance knows nothing of the demo"
    assert "Next: songvec dev --demo shows this run" in output, "`.env` names another database"
    (project.folder / ".env").write_text(MISLEADING)
    code, output = project.run("songvec", "demo")
    assert re.search(rf"embedding_cache\s+{N_SAMPLES}\s+\S+\s+0\s+\$0.0000\s+{N_SAMPLES}\s+0\s+0", output), output
    (project.folder / ".env").unlink()
    assert (project.folder / ".songvec" / "dagster" / "dagster.yaml").read_text().startswith("telemetry:")
    code, output = project.run("songvec", "status", "--json")
    assert (code, json.loads(output)["total"]["n_loaded"]) == (0, N_SAMPLES)
    code, output = project.run("songvec", "search", "chess", "-n", "1")
    assert (code, "The Bishop's Long Diagonal" in output) == (0, True)


def test_a_real_run_is_estimated_then_paid_once(project: Project, provider: Provider) -> None:
    settings = provider_settings(provider)
    code, output = project.run("songvec", "estimate", **settings)
    assert (code, bool(re.search(rf"Texts to embed\s+{N_SAMPLES}", output))) == (0, True), output
    assert provider.ledger()["requests"] == 0
    code, output = project.run("songvec", "run", "--max-usd", "0.0002", **settings)
    assert (code, "raise SONGVEC_MAX_USD" in output) == (1, True), output
    assert 0 < provider.ledger()["tokens_billed"] <= 2000
    code, output = project.run("songvec", "run", **settings)
    assert code == 0, output
    assert {count for text, count in provider.texts().items() if text != "probe"} == {1}
    assert len(provider.texts()) == N_SAMPLES + 1
    requests = provider.ledger()["requests"]
    code, output = project.run("songvec", "run", **settings)
    assert (code, provider.ledger()["requests"]) == (0, requests)
    code, output = project.run("songvec", "run")
    assert (code, "expected {'song_id': 'integer', 'embedding': 'vector(512)'}" in output) == (1, True), output


@pytest.mark.parametrize(
    ("command", "sent"),
    [
        (("songvec", "run"), signal.SIGINT),
        (
            ("dagster", "asset", "materialize", "--select", "*", "--partition-range", f"{FIRST}...{FIRST}"),
            signal.SIGTERM,
        ),
    ],
)
def test_an_interrupt_keeps_the_answers_on_their_way_and_the_next_run_sends_the_rest(
    project: Project, database: Database, holding_provider: Provider, command: tuple[str, ...], sent: signal.Signals
) -> None:
    create_songs_table(database)
    settings = provider_settings(holding_provider) | {"POSTGRES_URL": database.url}
    process = project.start(*command, cold=False, **settings)
    wait_until_held(holding_provider)
    requests = holding_provider.ledger()["requests"]
    send_signal(process, sent)
    holding_provider.control(latency_s=1.0)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "kept" in output, output
    assert holding_provider.ledger()["requests"] <= requests + N_AT_ONCE
    holding_provider.control()
    code, output = project.run("songvec", "run", **settings)
    assert code == 0, output
    assert {count for text, count in holding_provider.texts().items() if text != "probe"} == {1}


def test_a_second_interrupt_ends_at_once(project: Project, database: Database, holding_provider: Provider) -> None:
    create_songs_table(database)
    process = project.start("songvec", "run", **provider_settings(holding_provider), POSTGRES_URL=database.url)
    wait_until_held(holding_provider)
    send_signal(process, signal.SIGINT)
    time.sleep(1.0)  # the first one is being handled by now
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=GRACE_S - 5)
    assert process.returncode != 0


def test_errors_are_one_line_that_says_what_to_do(project: Project) -> None:
    for settings, words in (
        (
            {"POSTGRES_URL": "postgresql://u:secret@127.0.0.1:1/music", "FIREWORKS_API_KEY": "k"},
            "no server answers there",
        ),
        ({"POSTGRES_URL": "postgresql://u:secret@127.0.0.1:1/music"}, "FIREWORKS_API_KEY is not"),
        ({"SONGVEC_EMBEDDING_DIMENSIONS": "many"}, "SONGVEC_EMBEDDING_DIMENSIONS: expected a valid integer"),
        ({"SONGVEC_SONGS_TABLE": "tracks"}, "SONGVEC_SONGS_TABLE"),
    ):
        code, output = project.run("songvec", "run", **settings)
        assert (code, words in output) == (1, True), output
        assert "Traceback" not in output
        assert "secret" not in output


def test_a_swap_to_another_model_replaces_the_model_id_that_is_set(project: Project, provider: Provider) -> None:
    settings = provider_settings(provider) | {"SONGVEC_EMBEDDING_DIMENSIONS": "64", "SONGVEC_STORAGE": "store"}
    code, output = project.run("songvec", "run", **settings, SONGVEC_MODEL_ID="ours")
    assert code == 0, output
    provider.control(model="theirs")
    code, output = project.run("songvec", "swap", "--model", "theirs", **settings, SONGVEC_MODEL_ID="ours")
    assert (code, "Searches now find vector(64) by theirs" in output) == (0, True), output
    assert "SONGVEC_EMBEDDING_MODEL=theirs SONGVEC_MODEL_ID=theirs" in output


def test_swap_puts_another_type_in_place_and_back(demo: tuple[Project, str]) -> None:
    project, _ = demo
    code, output = project.run("songvec", "swap", "--vector-type", "halfvec")
    assert code == 0, output
    assert "Swapped in: 176 rows, 176 before; recall " in output
    assert "Searches now find halfvec(512) by demo-v2" in output
    assert "SONGVEC_VECTOR_TYPE=halfvec" in output
    code, output = project.run("songvec", "search", "a storm at sea")
    assert code == 0, output
    code, output = project.run("songvec", "swap", "--rollback")
    assert (code, "Searches now find vector(512) by demo-v2" in output) == (0, True), output
    code, output = project.run("songvec", "swap")
    assert (code, "searches find vector(512) by demo-v2 already" in output) == (1, True), output
    assert "[settings.unchanged]" in output
    code, output = project.run("songvec", "status")
    assert "Table song_embeddings_new: halfvec(512) by demo-v2" in output
    code, output = project.run("songvec", "swap", "--drop-old")
    assert (code, "Dropped: song_embeddings_new" in output) == (0, True), output


def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = "from songvec_assets.cli import main; main()"
        ended = subprocess.run(
            [sys.executable, "-c", code, "dev", "--port", str(port)],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert ended.returncode == 1
    assert f"expected a free port, got {port}" in " ".join(ended.stderr.split())
    assert "--port" in ended.stderr
