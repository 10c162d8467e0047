"""The first contact with a server, in a run and in a search: what is wrong shows at once, what is slow is waited for.

A scenario across embedding, cache and command line. Time limits are shortened; what ends by them would else end with
the patience of ten minutes.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app
from songvec_assets.embedding import client as client_module
from songvec_assets.embedding import contact as contact_module
from songvec_assets.embedding import transport as transport_module
from songvec_assets.errors import ProviderError, ProviderUnavailableError, SettingsError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets_tests.administration import free_port
from songvec_assets_tests.cache.filling import assert_stored, export, fill, plain_songs, plain_texts, try_fill
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider

pytestmark = pytest.mark.slow

HTML = "<!doctype html><title>Welcome to nginx!</title>"


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_module, "MAX_BACKOFF_S", 0.02)
    for name, seconds in {
        "FIRST_PATIENCE_S": 0.2, "FIRST_PATIENCE_CLOSED_S": 0.4, "FIRST_CONNECT_TIMEOUT_S": 0.5
    }.items():  # fmt: skip
        monkeypatch.setattr(transport_module, name, seconds)


@pytest.fixture
def pipeline_at(
    database: Database, songs: Callable[..., None], provider: Provider, tmp_path: Path
) -> Callable[..., Pipeline]:
    """A pipeline over twenty songs in two ranges whose server is at some URL."""
    songs(*plain_songs([*range(1, 11), *range(101, 111)]))
    return lambda **settings: make_pipeline(database, provider, tmp_path / "store", **settings)


@contextlib.contextmanager
def listener(greeting: bytes | None) -> Iterator[int]:
    """The port of something that is no HTTP server: it says its greeting and hangs up; None: it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as held:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    if greeting is None:
                        held.enter_context(connection)
                        continue
                    connection.sendall(greeting)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
                    connection.close()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        accepting.join(10)


def assert_ends(pipeline: Pipeline, *words: str, kind: type[Exception] = ProviderError) -> None:
    """A run ends by its first request, with these words and the URL."""
    reports, error = try_fill(pipeline)
    error = error or reports[0].error
    assert type(error) is kind, error
    for each in (pipeline.settings.fireworks_base_url, *words):
        assert each in str(error)
    assert "answered 503" not in str(error)


class TestAWrongUrl:
    def test_of_a_host_without_a_name(self, pipeline_at: Callable[..., Pipeline]) -> None:
        pipeline = pipeline_at(fireworks_base_url="http://nowhere.invalid/v1")
        assert_ends(pipeline, "does not resolve: correct FIREWORKS_BASE_URL", kind=ProviderUnavailableError)

    def test_of_a_closed_port(self, pipeline_at: Callable[..., Pipeline]) -> None:
        pipeline = pipeline_at(fireworks_base_url=f"http://127.0.0.1:{free_port()}/v1")
        assert_ends(pipeline, "cannot be reached", "nothing listens there", kind=ProviderUnavailableError)

    def test_of_a_server_that_speaks_no_tls(self, pipeline_at: Callable[..., Pipeline]) -> None:
        with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
            pipeline = pipeline_at(fireworks_base_url=f"https://127.0.0.1:{port}/v1")
            assert_ends(pipeline, "FIREWORKS_BASE_URL begins with http://", kind=ProviderUnavailableError)

    @pytest.mark.parametrize(
        ("greeting", "words"),
        [(b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak HTTP"), (b"", "hangs up: start the server")],
        ids=["ssh", "a proxy without its server"],
    )
    def test_of_something_that_is_no_web_server(
        self, pipeline_at: Callable[..., Pipeline], greeting: bytes, words: str
    ) -> None:
        with listener(greeting) as port:
            pipeline = pipeline_at(fireworks_base_url=f"http://127.0.0.1:{port}/v1")
            assert_ends(pipeline, words, kind=ProviderUnavailableError)

    def test_of_a_server_that_does_not_end_the_tls_handshake(self, pipeline_at: Callable[..., Pipeline]) -> None:
        with listener(None) as port:
            pipeline = pipeline_at(fireworks_base_url=f"https://127.0.0.1:{port}/v1")
            assert_ends(pipeline, "the host does not answer", kind=ProviderUnavailableError)

    @pytest.mark.parametrize("page", [HTML, "{}", '{"data": "none"}'])
    def test_of_a_page(self, pipeline_at: Callable[..., Pipeline], provider: Provider, page: str) -> None:
        provider.control(page=page)
        assert_ends(pipeline_at(), "/embeddings gives no embeddings", page[:20], "correct FIREWORKS_BASE_URL")

    def test_of_a_path_that_is_none(self, pipeline_at: Callable[..., Pipeline], provider: Provider) -> None:
        wrong = provider.base_url.removesuffix("/v1")
        assert_ends(pipeline_at(fireworks_base_url=wrong), "answered 404", "ends in /v1")
        provider.control(mode="lmstudio")
        assert_ends(pipeline_at(fireworks_base_url=wrong), "Unexpected endpoint", "FIREWORKS_BASE_URL")

    @pytest.mark.parametrize(
        ("location", "words"),
        [
            ("https://music.example/v1/embeddings", "set FIREWORKS_BASE_URL=https://music.example/v1"),
            ("/login?next=%2Fv1", "correct FIREWORKS_BASE_URL"),
        ],
    )
    def test_of_a_server_that_redirects_gets_no_key_elsewhere(
        self, pipeline_at: Callable[..., Pipeline], provider: Provider, location: str, words: str
    ) -> None:
        provider.control(redirect=location)
        assert_ends(pipeline_at(), "answered 301", location, words)
        assert provider.ledger()["requests"] == 1

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("http://localhost:8000/v1/embeddings", "http://localhost:8000/v1"),
            ("http://localhost:8000/v1/embeddings/", "http://localhost:8000/v1"),
            ("https://music.example/api/v1/chat/completions", "https://music.example/api/v1"),
            ("https://music.example/v1?api-version=2024-10-21", "https://music.example/v1"),
        ],
    )
    def test_that_shows_is_refused_with_the_right_one_by_a_dry_run_too(
        self, pipeline_at: Callable[..., Pipeline], wrong: str, right: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(SettingsError, match=rf"FIREWORKS_BASE_URL.*set .*{right}(,|$)"):
            pipeline_at(fireworks_base_url=wrong)
        monkeypatch.setenv("FIREWORKS_BASE_URL", wrong)
        result = CliRunner().invoke(app, ["run", "--dry-run"])
        assert right in str(result.exception)

    def test_that_redirects_is_refused_with_the_right_one_by_a_dry_run_that_sends_nothing(
        self, pipeline_at: Callable[..., Pipeline], provider: Provider
    ) -> None:
        pipeline = pipeline_at()
        pipeline.export()
        provider.control(redirect="https://music.example/v1/embeddings")
        with pytest.raises(ProviderError, match=r"answered 301.*set FIREWORKS_BASE_URL=https://music\.example/v1$"):
            pipeline.dry_run(list(pipeline.tiling))
        assert provider.ledger()["requests"] == 0
        provider.control()
        assert pipeline.dry_run(list(pipeline.tiling)).estimate.n_texts > 0

    @pytest.mark.parametrize("url", ["http:///v1", "http://localhost:99999/v1", "http://localhost:port/v1"])
    def test_without_a_host_or_port_is_refused(self, pipeline_at: Callable[..., Pipeline], url: str) -> None:
        with pytest.raises(SettingsError, match=r"FIREWORKS_BASE_URL must be http.*with a host and a valid port"):
            pipeline_at(fireworks_base_url=url)


def test_a_busy_server_is_not_a_wrong_one(pipeline_at: Callable[..., Pipeline], provider: Provider) -> None:
    provider.control(statuses=[{"status": 503, "count": 40}])
    pipeline = pipeline_at()
    fill(pipeline)
    assert_stored(pipeline, plain_texts([*range(1, 11), *range(101, 111)]))
    assert provider.ledger()["requests_by_status"]["503"] == 40


def test_after_a_good_answer_patience_is_as_configured(
    pipeline_at: Callable[..., Pipeline], provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page for a while, such as a gateway's in maintenance, in the middle of a run."""
    monkeypatch.setattr(transport_module, "FIRST_PATIENCE_S", 0.0)
    pipeline, pages = pipeline_at(max_request_texts=2, concurrency=1), []
    export(pipeline)

    def watch(progress: Progress) -> None:
        if progress.done and not pages:
            pages.append(provider.control(page=HTML))
            threading.Timer(0.5, provider.control).start()

    pipeline.filler(progress=watch).fill_ranges(list(pipeline.tiling), lambda _: None)
    assert_stored(pipeline, plain_texts([*range(1, 11), *range(101, 111)]))


class TestAModelThatLoads:
    @pytest.fixture(autouse=True)
    def _hasty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a client would hang up before the model is loaded, and says after 0.2 s that it waits."""
        monkeypatch.setattr(client_module, "BASE_TIMEOUT_S", 1.5)
        monkeypatch.setattr(contact_module, "FIRST_NOTE_S", 0.2)

    def test_is_waited_for_in_a_run_that_says_so(
        self, pipeline_at: Callable[..., Pipeline], provider: Provider
    ) -> None:
        provider.control(mode="ollama")
        pipeline, notes = pipeline_at(), list[Progress]()
        export(pipeline)
        pipeline.filler(progress=notes.append).fill_ranges([SongIdRange(0, 100)], lambda _: None)
        assert_stored(pipeline, plain_texts(range(1, 11)))
        (waiting,) = [note for note in notes if note.is_trouble]
        assert f"waiting for {provider.base_url}" in waiting.note
        assert provider.ledger()["loads"] == 1, "nobody hung up"

    def test_is_waited_for_in_a_search_that_says_so(
        self, pipeline_at: Callable[..., Pipeline], provider: Provider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline = pipeline_at()
        fill(pipeline)
        pipeline.load()
        provider.control(mode="ollama")
        search_with(pipeline, monkeypatch)
        result = CliRunner().invoke(app, ["search", "song 7", "-n", "1"])
        assert result.exit_code == 0, result.output
        assert f"waiting for {provider.base_url}" in "".join(result.stderr.split("\n"))
        assert "waiting" not in result.stdout and "song 7" not in result.stderr
        assert provider.ledger()["loads"] == 1


def test_a_search_names_a_wrong_url(
    pipeline_at: Callable[..., Pipeline], provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_at()
    fill(pipeline)
    pipeline.load()
    provider.control(page=HTML)
    search_with(pipeline, monkeypatch)
    result = CliRunner().invoke(app, ["search", "song 7"])
    assert f"{provider.base_url}/embeddings gives no embeddings" in str(result.exception)


def search_with(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a command's environment to that of a pipeline."""
    settings = pipeline.settings
    for name, value in {
        "POSTGRES_URL": settings.postgres_url,
        "FIREWORKS_API_KEY": settings.fireworks_api_key,
        "FIREWORKS_BASE_URL": settings.fireworks_base_url,
        "SONGVEC_STORAGE": settings.storage,
        "SONGVEC_EMBEDDING_DIMENSIONS": "64",
        "SONGVEC_RANGE_SIZE": settings.range_size,
        "SONGVEC_SONG_ID_STOP": settings.song_id_stop,
    }.items():
        monkeypatch.setenv(name, str(value))
