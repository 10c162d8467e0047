"""A deployment over several machines, as processes: Redis, a code location, the daemon, and Celery workers.

Each process has a home, a temporary folder and a DAGSTER_HOME of its own, and so nothing in common with the others but
Postgres, Redis and a bucket. Dagster's configuration is that of `deploy/` and docs/deployment.md. Kills are SIGKILL, to
processes that were started here.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from songvec_assets.settings import variables
from songvec_assets_tests.administration import execute, free_port, wait_until

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "deployment.md"
_BIN = Path(sys.executable).parent
_LAUNCH = """
    mutation ($params: LaunchBackfillParams!) {
        launchPartitionBackfill(backfillParams: $params) {
            __typename
            ... on LaunchBackfillSuccess { backfillId }
            ... on PythonError { message }
        }
    }
"""
_RUNS = """
    SELECT status, count(*) FROM runs JOIN run_tags USING (run_id)
    WHERE key = 'dagster/backfill' AND value = %s GROUP BY status
"""


def read_documented(title: str, language: str) -> str:
    """The first block of a language in a section of docs/deployment.md."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1]
    return section.split(f"```{language}\n")[1].split("```")[0]


def make_configuration(**overrides: Mapping[str, Any]) -> dict[str, Any]:
    """dagster.yaml as documented, some of its values replaced."""
    configuration: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "dagster.yaml").read_text(encoding="utf-8"))
    configuration |= yaml.safe_load(read_documented("Several machines, with Celery", "yaml"))
    for name, values in overrides.items():
        configuration[name] = configuration.get(name, {}) | values
    return configuration


@dataclass
class Worker:
    """A Celery worker: its main process, and the child that executes one run at a time."""

    name: str
    process: "subprocess.Popen[bytes]"

    def kill(self, everything: bool = True) -> bool:
        """SIGKILL the machine, or only the process that executes a run, as the kernel does if memory is short.

        Returns:
            Whether there was anything to kill.
        """
        if everything:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return True
        children = psutil.Process(self.process.pid).children()
        for child in children:
            child.kill()
        return bool(children)


@dataclass
class Fleet:
    """The processes, and what they share.

    Attributes:
        folder: for their homes and logs.
        dagster_url: of the database of Dagster's instance.
        environment: of all of them: songvec's settings, the bucket's variables.
        configuration: dagster.yaml.
        workers: that were started and not killed, by name.
    """

    folder: Path
    dagster_url: str
    environment: Mapping[str, str]
    configuration: Mapping[str, Any]
    workers: dict[str, Worker] = field(default_factory=dict)
    _ports: dict[str, int] = field(default_factory=lambda: {"redis": free_port(), "code": free_port()})
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> "Fleet":
        """Start Redis, and begin to start the code location."""
        redis = ["redis-server", "--port", self._ports["redis"], "--bind", "127.0.0.1", "--save", "", "--appendonly"]
        self._start("redis", *redis, "no", "--dir", self.folder)
        code = ["dagster", "api", "grpc", "-m", "songvec_assets.definitions", "-h", "127.0.0.1", "-p"]
        self._start("code", *code, self._ports["code"], "--location-name", "songvec_assets")
        wait_until(lambda: _listens(self._ports["redis"]))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_daemon(self) -> None:
        """Start the daemon, which looks for new backfills at once, and then every 30 seconds."""
        self._start("daemon", "dagster-daemon", "run", "--workspace", self._workspace())

    def start_worker(self, name: str) -> None:
        """Start a worker, in a new home."""
        command = read_documented("Several machines, with Celery", "sh").strip().split()
        self.workers[name] = Worker(name, self._start(name, *command, "--hostname", f"{name}@%h"))

    def kill_worker(self, name: str) -> None:
        """End a worker and all that it does as if its machine lost power."""
        self.workers.pop(name).kill()

    def submit(self, keys: Sequence[str], tags: Mapping[str, str], **options: Any) -> str:
        """Launch a backfill of `embedding_cache` as the UI does; its id.

        Args:
            keys: of the ranges.
            tags: of its runs.
            options: of the resource `run`.
        """
        params = {
            "assetSelection": [{"path": ["embedding_cache"]}],
            "partitionNames": [*keys],
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
            "runConfigData": {"resources": {"run": {"config": options}}} if options else {},
        }
        wait_until(lambda: _listens(self._ports["code"]), seconds=120)
        answer = self.folder / "answer.json"
        command = ["dagster-graphql", "--workspace", self._workspace(), "--output", answer, "--text", _LAUNCH]
        done = subprocess.run(
            [*map(str, command), "--variables", json.dumps({"params": params})],
            env=self._environment("submit"),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"no backfill was launched: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        launched = json.loads(answer.read_text(encoding="utf-8"))["data"]["launchPartitionBackfill"]
        if "backfillId" not in launched:
            raise RuntimeError(f"no backfill was launched: {launched}")
        return str(launched["backfillId"])

    def count_runs(self, backfill: str) -> Counter[str]:
        """The runs of a backfill, retries included, by their status."""
        return Counter(dict(execute(self.dagster_url, _RUNS, (backfill,))))

    def status_of(self, backfill: str) -> str:
        """A backfill's status: REQUESTED while it runs."""
        [(status,)] = execute(self.dagster_url, "SELECT status FROM bulk_actions WHERE key = %s", (backfill,))
        return str(status)

    def read_log(self, name: str) -> str:
        """What a process wrote."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def run_command(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """A `songvec` command on yet another machine."""
        return subprocess.run(
            [str(_BIN / "songvec"), *command],
            env=self._environment("command"),
            cwd=self.folder / "command",
            capture_output=True,
            text=True,
            check=False,
        )

    def _workspace(self) -> Path:
        path = self.folder / "workspace.yaml"
        server = {"host": "127.0.0.1", "port": self._ports["code"], "location_name": "songvec_assets"}
        path.write_text(yaml.safe_dump({"load_from": [{"grpc_server": server}]}), encoding="utf-8")
        return path

    def _environment(self, name: str) -> dict[str, str]:
        """The environment of a process, with a home of its own."""
        home = self.folder / name
        temporary = home / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        (home / "dagster.yaml").write_text(yaml.safe_dump(dict(self.configuration)), encoding="utf-8")
        dropped = {*variables(), "DAGSTER_HOME"}
        redis = f"redis://127.0.0.1:{self._ports['redis']}"
        return {each: value for each, value in os.environ.items() if each not in dropped} | {
            "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "DAGSTER_HOME": str(home),
            "DAGSTER_POSTGRES_URL": self.dagster_url.replace("postgresql://", "postgresql+psycopg2://"),
            "CELERY_BROKER_URL": f"{redis}/0",
            "CELERY_RESULT_BACKEND": f"{redis}/1",
            **self.environment,
        }

    def _start(self, name: str, *command: object) -> "subprocess.Popen[bytes]":
        environment = self._environment(name)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(each) for each in command],
                cwd=self.folder / name,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._stack.callback(_end, process)
        return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL a process and its children: the databases, which are the block's, must be free afterwards."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
