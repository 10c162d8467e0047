"""The services of a compose file as local processes, where containers cannot run: bubblewrap in place of Docker.

A service sees the files that its image has, its mounts, secrets and environment, and nothing else; it is not root, and
its root file system is read-only. `tini` is process 1, as with Docker's `init: true`. The virtual environment of the
tests takes the place of the image's. All services share the network of this process.
"""

import contextlib
import json
import re
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from dotenv import dotenv_values

ROOT = Path(__file__).parents[2]
COMPOSE, DOCKERFILE = ROOT / "deploy" / "compose.yaml", ROOT / "deploy" / "Dockerfile"
BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_GRACE = "10s"
PATIENCE_S = 240.0
"""Until a service is healthy on a busy machine."""

CARRIED_OUT = {
    "command", "environment", "env_file", "secrets", "volumes", "tmpfs", "read_only", "init", "depends_on",
    "healthcheck", "stop_grace_period", "configs", "entrypoint", "user", "profiles",
}  # fmt: skip
LEFT_TO_DOCKER = {"image", "build", "restart", "ports", "cap_drop", "security_opt", "logging", "shm_size"}


@dataclass(frozen=True)
class Image:
    """What the last stage of a Dockerfile says.

    Attributes:
        environment: its variables.
        folder: its working directory.
        uid: its user, a number.
        command: its command.
        healthcheck: as a compose file has it.
        files: what is copied into it: paths there, and where they are here.
    """

    environment: dict[str, str]
    folder: str
    uid: str
    command: list[str]
    healthcheck: dict[str, Any]
    files: dict[str, Path]


def read_image(dockerfile: Path = DOCKERFILE, context: Path = ROOT) -> Image:
    """Read a Dockerfile with the instructions that ours has; another one is a KeyError."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", " ")
    _, last_stage = re.split(r"^FROM .*\n", text, flags=re.M)[-2:]
    found: dict[str, Any] = {"ENV": {"PATH": BASE_PATH}, "COPY": {}}
    for line in filter(str.strip, last_stage.splitlines()):
        instruction, words = line.split(None, 1)
        match instruction:
            case "ENV":
                for name, _, value in (pair.partition("=") for pair in shlex.split(words)):
                    found["ENV"][name] = string.Template(value).substitute(found["ENV"])
            case "COPY":
                found["COPY"] |= _read_copy(words.split(), found.get("WORKDIR", "/"), context)
            case "HEALTHCHECK":
                options, test = words.split("CMD", 1)
                pairs = dict(option.removeprefix("--").split("=") for option in options.split())
                found[instruction] = {name.replace("-", "_"): value for name, value in pairs.items()}
                found[instruction]["test"] = ["CMD", *json.loads(test)]
            case "CMD":
                found[instruction] = json.loads(words)
            case _:
                found[instruction] = words.strip()
    assert found.keys() == {"ENV", "COPY", "RUN", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}, found.keys()
    uid = found["USER"].partition(":")[0]
    return Image(found["ENV"], found["WORKDIR"], uid, found["CMD"], found["HEALTHCHECK"], found["COPY"])


def _read_copy(words: Sequence[str], folder: str, context: Path) -> dict[str, Path]:
    *sources, target = words
    if sources[0].startswith("--from="):
        assert sources[1:] == [target], "only the virtual environment is copied from another stage"
        return {target: Path(sys.prefix)}
    assert target == "./"
    return {f"{folder}/{Path(source).name}": context / source for source in sources}


SEAWEEDFS = Image({"PATH": f"{sys.prefix}/bin:{BASE_PATH}"}, "/data", "", [], {}, {})
"""The image of the S3 server; `weed` is the one of the tests."""


@dataclass
class Container:
    """A service, as `docker compose` runs it.

    Attributes:
        name: the service's.
        service: its part of the compose file.
        image: the service's.
        project: folder of the compose file, with its secrets; logs and volumes are below it, too.
    """

    name: str
    service: Mapping[str, Any]
    image: Image
    project: Path
    _process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    @property
    def healthcheck(self) -> dict[str, Any]:
        """The service's, or its image's."""
        return dict(self.service.get("healthcheck") or self.image.healthcheck)

    @property
    def grace_s(self) -> float:
        """Seconds from SIGTERM to SIGKILL."""
        return seconds(self.service.get("stop_grace_period", DEFAULT_GRACE))

    @property
    def log(self) -> str:
        """What it wrote."""
        return (self.project / f"{self.name}.log").read_text(errors="replace")

    def start(self) -> None:
        """As `docker compose up`."""
        command = [*self.service.get("entrypoint", ()), *self.service.get("command", self.image.command)]
        with (self.project / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._sandbox(), "--as-pid-1", "--", "tini", "--", *command], stdout=log, stderr=subprocess.STDOUT
            )

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """As `docker compose exec`."""
        return subprocess.run([*self._sandbox(), "--", *command], check=False, capture_output=True, text=True)

    def wait_until_healthy(self) -> float:
        """Ask its health check until it passes; the seconds that took."""
        kind, *test = self.healthcheck["test"]
        assert kind == "CMD"
        began = time.monotonic()
        while (answer := self.run(*test)).returncode:
            assert self._process and self._process.poll() is None, f"{self.name} ended:\n{self.log}"
            assert time.monotonic() < began + PATIENCE_S, f"{answer.stdout}{answer.stderr}\n{self.name}:\n{self.log}"
            time.sleep(seconds(self.healthcheck["start_interval"]))
        return time.monotonic() - began

    def stop(self) -> float:
        """As `docker compose stop`; the seconds until it ended. It fails where that takes SIGKILL."""
        assert self._process is not None
        [first] = psutil.Process(self._process.pid).children()
        began = time.monotonic()
        first.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=self.grace_s)
        assert self._process.returncode is not None, f"{self.name} did not end in {self.grace_s:.0f} s:\n{self.log}"
        return time.monotonic() - began

    def _sandbox(self) -> list[str]:
        assert self.service.keys() <= CARRIED_OUT | LEFT_TO_DOCKER, "say here who carries a new key out"
        assert self.service["read_only"] and self.service["init"]
        arguments = ["bwrap", "--die-with-parent", "--unshare-user", "--unshare-pid", "--unshare-ipc"]
        uid = self.service.get("user", self.image.uid).partition(":")[0]
        arguments += ["--uid", uid, "--gid", uid, "--new-session", "--clearenv"]
        arguments += ["--proc", "/proc", "--dev", "/dev"]
        for link in ("bin", "lib", "lib64", "sbin"):
            arguments += ["--symlink", f"usr/{link}", f"/{link}"]
        # what stands in for the base image: the system, Python, and what the virtual environment refers to
        system = {
            path: Path(path) for path in ("/usr", "/etc", sys.base_prefix, sys.prefix, str(ROOT / "songvec_assets"))
        }
        names = {name: self.project / name for name in ("hosts", "passwd")}
        secrets = {f"/run/secrets/{name}": self.project / "secrets" / name for name in self.service.get("secrets", ())}
        mounts = system | {f"/etc/{name}": path for name, path in names.items()} | self.image.files | secrets
        # first, since this project may be below one of them
        for target in self.service.get("tmpfs", ()):
            arguments += ["--tmpfs", target]
        for target, source in mounts.items():
            arguments += ["--ro-bind", str(source), target]
        for volume in self.service.get("volumes", ()):
            name, target, *options = volume.split(":")
            assert options in ([], ["ro"])
            (self.project / "volumes" / name).mkdir(parents=True, exist_ok=True)
            bind = "--ro-bind" if options else "--bind"
            arguments += [bind, str(self.project / "volumes" / name), target]
        for name, value in self._environment().items():
            arguments += ["--setenv", name, str(value)]
        return [*arguments, "--remount-ro", "/", "--chdir", self.image.folder]

    def _environment(self) -> dict[str, Any]:
        found: dict[str, Any] = dict(self.image.environment)
        for file in self.service.get("env_file", ()):
            assert file["required"] is False or (self.project / file["path"]).exists()
            found |= dotenv_values(self.project / file["path"])
        return found | self.service.get("environment", {})


def read_services(compose: Path = COMPOSE) -> dict[str, dict[str, Any]]:
    """The services of a compose file, each after those that it depends on."""
    services = yaml.safe_load(compose.read_text())["services"]
    ordered: dict[str, dict[str, Any]] = {}
    while waiting := services.keys() - ordered.keys():
        ready = [
            name
            for name in services
            if name in waiting and services[name].get("depends_on", {}).keys() <= ordered.keys()
        ]
        assert ready, f"these wait for one another: {waiting}"
        ordered |= {name: services[name] for name in ready}
    return ordered


def seconds(duration: str) -> float:
    """A duration as compose files have it, with one unit: `90s`, `1m`."""
    number, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]
