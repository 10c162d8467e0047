"""Runs killed and interrupted in the middle: processes of their own, a real provider that counts what it bills.

Run as a module, this is the process: it fills all ranges of the pipeline that its argument describes.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import run_in_worker
from songvec_assets.settings import Settings
from songvec_assets_tests.cache.filling import assert_stored, billed, export, fill, plain_songs, plain_texts, stored
from songvec_assets_tests.conftest import TILING, make_pipeline
from songvec_assets_tests.processes import send_signal
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.s3 import S3, Kind
from songvec_assets_tests.warm import WarmProcess
from songvec_assets_tests.warm import start as start_warm

pytestmark = pytest.mark.slow

REQUEST_TEXTS, CONCURRENCY = 8, 4
IN_FLIGHT = REQUEST_TEXTS * CONCURRENCY
"""Texts that a kill may cost."""


@dataclass(frozen=True)
class Filling:
    """A process that fills all ranges once it is told to begin."""

    process: WarmProcess

    def begin(self) -> None:
        self.process.stdin.write("begin\n")
        self.process.stdin.flush()

    def interrupt(self) -> None:
        send_signal(self.process, signal.SIGINT)

    def assert_interrupted(self, within_s: float) -> None:
        """It ends as a process does that Ctrl+C ended."""
        started = time.monotonic()
        words, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == -signal.SIGINT, words
        assert time.monotonic() - started < within_s


@pytest.fixture
def pipeline(
    request: pytest.FixtureRequest, database: Database, provider: Provider, tmp_path: Path, use_s3: Callable[[Kind], S3]
) -> Pipeline:
    """Over a folder, or a bucket of the kind that a test names."""
    kind = getattr(request, "param", "folder")
    return make_pipeline(database, provider, tmp_path / "store" if kind == "folder" else use_s3(kind).new_url())


@pytest.fixture
def start(pipeline: Pipeline, provider: Provider) -> Iterator[Callable[[int], list[Filling]]]:
    """Starts processes over the test's database and store; they load their modules side by side and wait."""
    settings = {
        "postgres_url": pipeline.database.url,
        "fireworks_api_key": provider.api_key,
        "fireworks_base_url": provider.base_url,
        "storage": pipeline.settings.storage,
        "embedding_dimensions": pipeline.settings.embedding_dimensions,
        "requests_per_minute": pipeline.settings.requests_per_minute,
        "tokens_per_minute": pipeline.settings.tokens_per_minute,
        "range_size": pipeline.settings.range_size,
        "song_id_stop": pipeline.settings.song_id_stop,
        "max_request_texts": REQUEST_TEXTS,
        "concurrency": CONCURRENCY,
    }
    started: list[WarmProcess] = []

    def begin(n_processes: int) -> list[Filling]:
        fresh = [start_warm(["-m", __name__, json.dumps(settings)]) for _ in range(n_processes)]
        started.extend(fresh)
        for process in fresh:
            assert process.stdout.readline() == "ready\n"
        return [Filling(process) for process in fresh]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    """Ask until it holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.005)


def n_billed_again(provider: Provider) -> int:
    """Texts of songs that were billed and had been billed before."""
    return sum(count - 1 for count in billed(provider).values())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("pipeline", ["folder", "moto", "weed"], indirect=True)
def test_runs_killed_at_any_moment_lose_no_more_than_what_was_in_flight(
    songs: Callable[..., None],
    pipeline: Pipeline,
    provider: Provider,
    start: Callable[[int], list[Filling]],
) -> None:
    song_ids = range(600)
    songs(*plain_songs(song_ids))
    export(pipeline)
    # how much is billed when each is killed: within a range of 100 songs, at its end, and after several
    moments = [1, 90, 202, 330, 480]
    for filling, moment in zip(start(len(moments)), moments, strict=True):
        # however late the kill, it does not come after the end: a few requests later all answers are held
        provider.control(latency_s=(0.02, 0.08), hold_after=(moment - len(stored(pipeline))) // REQUEST_TEXTS + 8)
        filling.begin()
        wait_for(lambda moment=moment: len(billed(provider)) >= moment)  # type: ignore[misc]
        filling.process.kill()
        assert filling.process.wait() == -signal.SIGKILL, "it was killed in the middle"
        provider.control()
        # the provider bills what was in flight, though nobody waits for it
        wait_for(lambda: provider.count_in_flight() == 0)
        paid, kept = set(billed(provider)), set(plain_texts(list(stored(pipeline))).values())
        assert kept <= paid
        assert len(paid - kept) <= IN_FLIGHT
    fill(pipeline)
    assert_stored(pipeline, plain_texts(song_ids))
    assert set(billed(provider)) == set(plain_texts(song_ids).values())
    assert n_billed_again(provider) <= IN_FLIGHT * len(moments)


def test_a_run_that_waits_takes_over_when_the_other_is_killed(
    songs: Callable[..., None],
    pipeline: Pipeline,
    provider: Provider,
    start: Callable[[int], list[Filling]],
) -> None:
    song_ids = range(1, 90)
    songs(*plain_songs(song_ids))
    export(pipeline)
    provider.control(hold_after=3)
    (filling,) = start(1)
    filling.begin()
    wait_for(lambda: len(billed(provider)) >= 1)
    waiting = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        other = pipeline.filler(progress=lambda told: waiting.set() if "another run" in told.note else None)
        filled = pool.submit(other.fill_ranges, list(TILING), lambda _: None)
        assert waiting.wait(60)
        filling.process.kill()
        assert filling.process.wait() == -signal.SIGKILL, "it was killed in the middle"
        provider.control()
        filled.result()
    assert_stored(pipeline, plain_texts(song_ids))
    assert n_billed_again(provider) <= IN_FLIGHT


def test_after_an_interrupt_no_request_starts_and_those_in_flight_are_stored(
    songs: Callable[..., None],
    pipeline: Pipeline,
    provider: Provider,
    start: Callable[[int], list[Filling]],
) -> None:
    song_ids = [*range(1, 81), 150]
    songs(*plain_songs(song_ids))
    export(pipeline)
    provider.control(latency_s=1.0, hold_after=1)
    (filling,) = start(1)
    filling.begin()
    wait_for(lambda: provider.count_in_flight() == CONCURRENCY)
    filling.interrupt()
    provider.control()
    filling.assert_interrupted(within_s=10)
    assert provider.ledger()["requests"] == 1 + CONCURRENCY
    assert len(stored(pipeline)) == len(billed(provider)) == IN_FLIGHT
    provider.control()
    fill(pipeline)
    assert billed(provider) == dict.fromkeys(plain_texts(song_ids).values(), 1)
    assert_stored(pipeline, plain_texts(song_ids))


def test_a_second_interrupt_ends_the_run_at_once(
    songs: Callable[..., None],
    pipeline: Pipeline,
    provider: Provider,
    start: Callable[[int], list[Filling]],
) -> None:
    song_ids = range(1, 81)
    songs(*plain_songs(song_ids))
    export(pipeline)
    provider.control(hold_after=1 + CONCURRENCY)
    (filling,) = start(1)
    filling.begin()
    wait_for(lambda: provider.ledger()["requests"] == 1 + 2 * CONCURRENCY)
    filling.interrupt()
    with pytest.raises(subprocess.TimeoutExpired):  # the first interrupt leaves what is in flight its time
        filling.process.wait(1)
    filling.interrupt()
    filling.assert_interrupted(within_s=10)
    provider.control()
    wait_for(lambda: provider.count_in_flight() == 0)
    kept = len(stored(pipeline))
    assert kept >= REQUEST_TEXTS
    provider.reset_ledger()
    fill(pipeline)
    assert_stored(pipeline, plain_texts(song_ids))
    assert len(billed(provider)) == len(song_ids) - kept


def test_an_interrupt_does_not_wait_for_a_provider_that_is_down(
    songs: Callable[..., None],
    pipeline: Pipeline,
    provider: Provider,
    start: Callable[[int], list[Filling]],
) -> None:
    songs(*plain_songs(range(1, 81)))
    export(pipeline)
    provider.control(statuses=[{"status": 503, "retry_after_s": 60, "after": 2}])
    (filling,) = start(1)
    filling.begin()
    wait_for(lambda: provider.ledger()["requests"] >= 1 + CONCURRENCY)
    filling.interrupt()
    filling.assert_interrupted(within_s=10)
    assert provider.ledger()["requests"] == 1 + CONCURRENCY


def main() -> None:
    """Say that it is ready, wait for a line, fill; an interrupt is taken as the assets take it."""
    # a shell that starts the tests in its background would have it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipeline = Pipeline(Settings(**json.loads(sys.argv[1])))
    print("ready", flush=True)
    sys.stdin.readline()
    run_in_worker(
        lambda emit: pipeline.filler(progress=emit).fill_ranges(list(TILING), emit),
        report=lambda _: None,
        stop=pipeline.cancel,
    )


if __name__ == "__main__":
    main()
