"""Networks of other people: certificates of a private authority, and proxies. From the client to the commands.

The certificates are made by each run of the tests. What is not plain HTTP on the provider's port ends here.
"""

import asyncio
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from songvec_assets.embedding import contact as contact_module
from songvec_assets.embedding import transport as transport_module
from songvec_assets.errors import ProviderUnavailableError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import free_port
from songvec_assets_tests.cache.filling import assert_stored, fill, plain_songs, plain_texts, try_fill
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider

HOST = "music.example"
"""A name that resolves nowhere: what reaches it went through the proxy."""


@pytest.fixture(autouse=True)
def _no_network_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setattr(contact_module, "MAX_BACKOFF_S", 0.02)
    for name, seconds in {"FIRST_PATIENCE_S": 0.2, "FIRST_PATIENCE_CLOSED_S": 0.4}.items():
        monkeypatch.setattr(transport_module, name, seconds)


@pytest.fixture
def pipeline_at(
    database: Database, songs: Callable[..., None], provider: Provider, tmp_path: Path
) -> Callable[[str], Pipeline]:
    """A pipeline over ten songs whose server is at some URL."""
    songs(*plain_songs(range(1, 11)))
    return lambda url: make_pipeline(database, provider, tmp_path / "store", fireworks_base_url=url)


def make_authority(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """The certificate of a new authority, and a server's context with one that it signed."""
    now, key, own = datetime.datetime.now(datetime.UTC), *(ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Private CA")])

    def sign(name: x509.Name, of: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder(authority, name, of.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root, chain = folder / "authority.pem", folder / "server.pem"
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    root.write_bytes(sign(authority, key, x509.BasicConstraints(True, None), identifier, usage))
    names = x509.SubjectAlternativeName([x509.DNSName(HOST), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    private = own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    chain.write_bytes(private + sign(x509.Name([]), own, names, by, x509.BasicConstraints(False, None)))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain)
    return root, context


class Relay:
    """A port that passes what it gets to another one: a TLS server before the provider, or a proxy of a network.

    Attributes:
        port: where it listens.
        requested: the first line of each connection, where it is a proxy.
    """

    def __init__(self, to_port: int, is_proxy: bool = False) -> None:
        self.port, self.requested = 0, list[str]()
        self._to_port, self._is_proxy = to_port, is_proxy

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            back, forth = await asyncio.open_connection("127.0.0.1", self._to_port)
            if self._is_proxy:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requested.append(head.partition(b"\r\n")[0].decode())
                if head.startswith(b"CONNECT"):
                    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                else:
                    forth.write(head.replace(_ABSOLUTE, b"POST /"))
            await asyncio.gather(_pass_on(reader, forth), _pass_on(back, writer))


_ABSOLUTE = f"POST http://{HOST}/".encode()
"""How a request begins that a proxy is asked to pass on."""


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data.replace(_ABSOLUTE, b"POST /"))
            await writer.drain()
    writer.close()


@contextmanager
def running(relay: Relay, context: ssl.SSLContext | None = None) -> Iterator[Relay]:
    """A relay in a thread of its own."""
    loop, listening = asyncio.new_event_loop(), threading.Event()
    loop.set_exception_handler(lambda *_: None)  # a client that trusts nobody hangs up

    async def serve() -> None:
        async with await asyncio.start_server(relay.converse, "127.0.0.1", 0, ssl=context) as server:
            relay.port = server.sockets[0].getsockname()[1]
            listening.set()
            await server.serve_forever()

    def work() -> None:
        serving = loop.create_task(serve())
        loop.run_forever()
        assert serving.done()

    async def end() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        loop.stop()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert listening.wait(10)
    try:
        yield relay
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop)
        thread.join(10)
        loop.close()


@pytest.fixture
def authority(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """See `make_authority`."""
    return make_authority(tmp_path)


@pytest.fixture
def tls_port(provider: Provider, authority: tuple[Path, ssl.SSLContext]) -> Iterator[int]:
    """The provider behind TLS, with a certificate of the private authority."""
    with running(Relay(urlsplit(provider.base_url).port or 0), authority[1]) as relay:
        yield relay.port


def test_a_certificate_of_a_private_authority_is_refused_until_ssl_cert_file_names_it(
    pipeline_at: Callable[[str], Pipeline],
    authority: tuple[Path, ssl.SSLContext],
    tls_port: int,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"https://127.0.0.1:{tls_port}/v1"
    reports, error = try_fill(pipeline_at(url))
    error = error or reports[0].error
    assert type(error) is ProviderUnavailableError
    for words in (url, "certificate verify failed", "SSL_CERT_FILE"):
        assert words in str(error)
    assert provider.ledger()["requests"] == 0
    monkeypatch.setenv("SSL_CERT_FILE", str(authority[0]))
    pipeline = pipeline_at(url)
    fill(pipeline)
    assert_stored(pipeline, plain_texts(range(1, 11)))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_of_the_environment_is_used(
    pipeline_at: Callable[[str], Pipeline],
    authority: tuple[Path, ssl.SSLContext],
    tls_port: int,
    provider: Provider,
    songs: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority[0]))
    to_port = tls_port if scheme == "https" else urlsplit(provider.base_url).port or 0
    with running(Relay(to_port, is_proxy=True)) as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://127.0.0.1:{proxy.port}")
        pipeline = pipeline_at(f"{scheme}://{HOST}/v1")
        fill(pipeline)
        assert_stored(pipeline, plain_texts(range(1, 11)))
        assert proxy.requested
        assert all(HOST in line for line in proxy.requested)
        # and not where the environment says so
        n_before = len(proxy.requested)
        monkeypatch.setenv("NO_PROXY", HOST)
        songs((11, "Sea", "Ann", "la"))
        reports, error = try_fill(pipeline_at(f"{scheme}://{HOST}/v1"))
        assert "does not resolve" in str(error or reports[0].error)
        assert len(proxy.requested) == n_before


def test_a_proxy_that_is_not_there_is_named(
    pipeline_at: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{(port := free_port())}")
    reports, error = try_fill(pipeline_at(f"https://{HOST}/v1"))
    error = error or reports[0].error
    assert type(error) is ProviderUnavailableError
    for words in (f"https://{HOST}/v1", f"127.0.0.1:{port}", "HTTPS_PROXY", "NO_PROXY"):
        assert words in str(error)
