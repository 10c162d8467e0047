"""deploy/prometheus as a real Prometheus reads it: its rules, and a deployment that it scrapes until an alert fires."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import execute, free_port, wait_until
from songvec_assets_tests.conftest import environment_of
from songvec_assets_tests.deploy.containers import COMPOSE
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.warm import start as start_warm

FOLDER = COMPOSE.parent / "prometheus"
SONGVEC = str(Path(sys.executable).with_name("songvec"))
TOKEN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _tools() -> None:
    for tool in ("prometheus", "promtool", "prometheus-node-exporter"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} on the PATH: apt-get install prometheus prometheus-node-exporter")


@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "--syntax-only", str(FOLDER / "prometheus.yaml")),
        ("check", "rules", str(FOLDER / "alerts.yaml")),
        ("test", "rules", str(Path(__file__).with_name("alerts_test.yaml"))),
    ],
)
def test_promtool_accepts(check: tuple[str, ...]) -> None:
    checked = subprocess.run(["promtool", *check], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_is_tested() -> None:
    tested = Path(__file__).with_name("alerts_test.yaml").read_text()
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"]]
    assert [name for name in alerts if name not in tested] == []


@contextlib.contextmanager
def running(*command: str, environment: dict[str, str] | None = None) -> Iterator[None]:
    """A process, which is ended at the end of the block."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def answers(url: str, **headers: str) -> bool:
    try:
        return httpx2.get(url, headers=headers, timeout=5).is_success
    except httpx2.TransportError:
        return False


def write_configuration(folder: Path, server: str, node: str) -> Path:
    """The shipped configuration with other addresses, and without its patience."""
    configuration = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(FOLDER / "alerts.yaml")]
    [job] = configuration["scrape_configs"]
    job["authorization"]["credentials_file"] = str(folder / "token")
    job["static_configs"] = [{"targets": [server]}]
    configuration["scrape_configs"].append({"job_name": "node", "static_configs": [{"targets": [node]}]})
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return path


@pytest.mark.slow
def test_a_real_prometheus_sees_what_a_run_did_and_a_server_serves_and_its_alert_fires(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path
) -> None:
    songs((1, "Sea", "Ann", "waves and salt"), (2, "Hill", "Ben", "stones"), (3, "Moon", "Cy", "a silver light"))
    (tmp_path / "textfiles").mkdir()
    (tmp_path / "token").write_text(TOKEN)
    environment = dict(os.environ) | environment_of(database, provider, tmp_path) | {
        "DAGSTER_HOME": str(tmp_path),
        "SONGVEC_METRICS_TEXTFILE": str(tmp_path / "textfiles" / "songvec.prom"),
        "SONGVEC_USD_PER_MILLION_TOKENS": "1000",
    }  # fmt: skip
    server, node, prometheus = (f"127.0.0.1:{free_port()}" for _ in range(3))
    serve = SONGVEC, "serve", "--port", server.partition(":")[2], "--token-file", str(tmp_path / "token")
    exporter = (
        "prometheus-node-exporter",
        "--collector.disable-defaults",
        "--collector.textfile",
        f"--collector.textfile.directory={tmp_path / 'textfiles'}",
        f"--web.listen-address={node}",
    )
    scraper = (
        "prometheus",
        f"--config.file={write_configuration(tmp_path, server, node)}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={prometheus}",
        "--log.level=warn",
    )
    with (
        running(*exporter),
        running(*scraper),
        httpx2.Client(base_url=f"http://{prometheus}/api/v1", timeout=30) as client,
        contextlib.ExitStack() as stack,
    ):
        ran = start_warm([SONGVEC, "run"], tmp_path, environment)
        output, _ = ran.communicate()
        assert ran.returncode == 0, output
        [(spent,)] = execute(database.adbc_uri, "SELECT usd FROM songvec.budgets WHERE name LIKE 'month %'")
        limited = environment | {"SONGVEC_MAX_USD_A_MONTH": str(float(spent) * 1.2)}
        stack.enter_context(running(*serve, environment=limited))

        def query(expression: str) -> dict[str, float]:
            result: list[Any] = client.get("/query", params={"query": expression}).json()["data"]["result"]
            return {each["metric"].get("job", ""): float(each["value"][1]) for each in result}

        wait_until(lambda: answers(f"http://{server}/search?q=sea&mode=text", Authorization=f"Bearer {TOKEN}"))
        expected = {
            "up": {"songvec": 1, "node": 1},
            "node_textfile_scrape_error": {"node": 0},
            'songvec_songs{state="loaded"}': {"songvec": 3, "node": 3},
            "songvec_embedded_songs_total": {"songvec": 3, "node": 3},
            "songvec_rows_written_total": {"songvec": 3, "node": 3},
            "songvec_recall_ratio": {"songvec": 1, "node": 1},
            "round(songvec_spent_dollars_total * 1e6)": dict.fromkeys(("songvec", "node"), round(float(spent) * 1e6)),
            'songvec_search_duration_seconds_count{mode="text"}': {"songvec": 1},
            'ALERTS{alertname="SongvecBudgetNearLimit", alertstate="firing"}': {"": 1},
        }
        wait_until(lambda: {each: query(each) for each in expected} == expected)
