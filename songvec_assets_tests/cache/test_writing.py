"""Answers become parts together, each is durable when its own `store` returns, and no failure of one costs another."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from songvec_assets.cache import writing
from songvec_assets.cache.parts import PIECE_ROWS, SMALL_ROWS, CachedRows, PartIdentity, open_part
from songvec_assets.cache.writing import AnswerGatherer, PartWriter
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.cache.rows import RANGE, content_of, hashes_of, names, put, vectors_of

IDENTITY = PartIdentity("m", 2, SongIdRange(0, 100_000))


@pytest.fixture
def writer(tmp_path) -> PartWriter:
    return PartWriter(LocalStorage(tmp_path), IDENTITY, 0)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each part that was written."""
    counted: list[int] = []
    write = PartWriter.write

    def count_and_write(self, batches):
        write(self, batches)
        counted.append(sum(map(len, batches)))

    monkeypatch.setattr(PartWriter, "write", count_and_write)
    return counted


def answer(start: int, n_rows: int):
    """song_ids, hashes and vectors."""
    return range(start, start + n_rows), [bytes(16)] * n_rows, np.ones((n_rows, 2), np.float32)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop and its threads work until it holds."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def store_all(
    gatherer: AnswerGatherer, sizes: list[int], n_expected: int | None = None
) -> list[BaseException | None]:
    """Store answers of these sizes at once, while so many are expected; what each `store` raised."""
    with ExitStack() as expected:
        for _ in range(len(sizes) if n_expected is None else n_expected):
            expected.enter_context(gatherer.expecting())
        starts = np.cumsum([0, *sizes])
        storing = [gatherer.store(*answer(int(start), n)) for start, n in zip(starts, sizes, strict=False)]
        return await asyncio.gather(*storing, return_exceptions=True)


def test_answers_share_a_part_as_soon_as_none_is_waited_for(writer, written, monkeypatch) -> None:
    monkeypatch.setattr(writing, "GATHER_S", 60.0)
    assert asyncio.run(store_all(AnswerGatherer(writer), [3, 4, 5])) == [None] * 3
    assert written == [12]


def test_an_answer_waits_half_a_second_for_others_at_most(writer, written, monkeypatch) -> None:
    monkeypatch.setattr(writing, "GATHER_S", 0.02)
    assert asyncio.run(store_all(AnswerGatherer(writer), [3], n_expected=2)) == [None]
    assert written == [3]


@pytest.mark.parametrize(("sizes", "are_written"), [([SMALL_ROWS // 2] * 2, True), ([3, 4], False)])
def test_a_part_that_is_not_small_is_written_once_a_quarter_of_the_answers_waits(
    writer, written, monkeypatch, sizes, are_written
) -> None:
    monkeypatch.setattr(writing, "GATHER_S", 60.0)

    async def run() -> None:
        gatherer = AnswerGatherer(writer)
        with ExitStack() as in_flight:
            for _ in range(6):
                in_flight.enter_context(gatherer.expecting())
            storing = [asyncio.create_task(gatherer.store(*answer(at, size))) for at, size in enumerate(sizes)]
            done, _ = await asyncio.wait(storing, timeout=30 if are_written else 0.05)
            assert bool(done) == are_written
        await asyncio.gather(*storing)

    asyncio.run(run())
    assert written == [sum(sizes)]


def test_what_waits_is_one_part_whose_batches_have_up_to_a_piece_of_rows(writer, written) -> None:
    sizes = [PIECE_ROWS, 100, PIECE_ROWS - 100, 1, PIECE_ROWS + 5]
    assert asyncio.run(store_all(AnswerGatherer(writer), sizes)) == [None] * 5
    assert sum(written) == sum(sizes)
    assert len(written) == 1, "one sync for all"
    [file] = writer.files
    key = f"{IDENTITY.range.key}/{file.name}"
    stored = [len(each) for each in open_part(writer.storage.open(key).mapped, IDENTITY, key)]
    assert stored == [PIECE_ROWS, PIECE_ROWS, 1, PIECE_ROWS, 5]


@pytest.mark.parametrize("n_writes", [1, 3])
def test_parts_are_written_at_a_time_as_their_storage_is_worth(writer, monkeypatch, n_writes) -> None:
    monkeypatch.setattr(LocalStorage, "n_writes", n_writes)
    at_once, ended, write = [], threading.Semaphore(0), PartWriter.write

    def write_slowly(self, batches):
        assert threading.current_thread().daemon, "a process that was abandoned must not wait for an upload"
        at_once.append(len(batches))
        assert ended.acquire(timeout=60)
        write(self, batches)

    monkeypatch.setattr(PartWriter, "write", write_slowly)

    async def run() -> int:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        gatherer = AnswerGatherer(writer)
        storing = []
        for number in range(5):
            storing.append(asyncio.create_task(gatherer.store(*answer(number * PIECE_ROWS, PIECE_ROWS))))
            await asyncio.sleep(0.05)
            await until(lambda number=number: len(at_once) >= min(number + 1, n_writes))
        n_begun = len(at_once)
        assert not any(each.done() for each in storing), "no answer is stored before its part is"
        reached, _ = await asyncio.wait([asyncio.create_task(asyncio.to_thread(int))], timeout=50)
        ended.release(5)
        await asyncio.gather(*storing)
        assert reached, "the loop's own threads are for the database, which is asked before each request"
        return n_begun

    assert asyncio.run(run()) == n_writes
    assert sum(at_once) == 5, "what came while all were busy is one more part"
    assert len(writer.files) == n_writes + 1


def test_answers_wait_for_those_that_come_once_a_part_is_written(writer, written, monkeypatch) -> None:
    """Its answers hold slots, in which others are on their way as soon as it is durable."""
    monkeypatch.setattr(writing, "GATHER_S", 60.0)
    monkeypatch.setattr(LocalStorage, "n_writes", 4)
    begun, ended, count_and_write = threading.Event(), threading.Event(), PartWriter.write

    def write_slowly(self, batches):
        begun.set()
        assert ended.wait(60)
        count_and_write(self, batches)

    monkeypatch.setattr(PartWriter, "write", write_slowly)

    async def run() -> None:
        gatherer = AnswerGatherer(writer)
        first = asyncio.create_task(store_all(gatherer, [PIECE_ROWS // 8] * 8, n_expected=0))
        await until(begun.is_set)
        # nothing else is in flight
        others = []
        for number in range(3):
            others.append(asyncio.create_task(gatherer.store(*answer(PIECE_ROWS + number, 1))))
            await asyncio.sleep(0.05)
        ended.set()
        await asyncio.gather(first, *others)

    asyncio.run(run())
    assert sorted(written) == [3, PIECE_ROWS], "not a part of its own for each"


def test_threads_that_write_at_a_time_make_parts_of_their_own(cache):
    writer, begin = cache.open(RANGE).open_writer(), threading.Barrier(4)

    def write(first: int) -> None:
        begin.wait()
        for song_id in range(first, first + 40):
            writer.write([CachedRows.of([song_id], hashes_of([song_id]), vectors_of([song_id]))])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(0, 160, 40)))
    assert sorted(content_of(cache.open(RANGE))) == list(range(160))
    assert names(cache) == sorted(each.name for each in writer.files)
    assert len(writer.files) == 2 + 160 - 2 * 64, "twice 64 small ones became one"


def test_an_answer_that_ends_without_vectors_lets_the_others_be_written(writer, written, monkeypatch) -> None:
    monkeypatch.setattr(writing, "GATHER_S", 60.0)

    async def run() -> None:
        gatherer = AnswerGatherer(writer)
        with gatherer.expecting():
            storing = None
            with gatherer.expecting():
                storing = asyncio.create_task(gatherer.store(*answer(0, 3)))
                await asyncio.sleep(0.05)
                assert written == []
            await storing

    asyncio.run(run())
    assert written == [3]


def test_what_the_disk_refuses_is_raised_for_each_answer_and_the_next_ones_are_written(
    writer, written, monkeypatch
) -> None:
    def refuse(*_given):
        raise StoreError("could not write")

    async def run() -> list[BaseException | None]:
        gatherer = AnswerGatherer(writer)
        with monkeypatch.context() as broken:
            broken.setattr(LocalStorage, "write", refuse)
            outcomes = await store_all(gatherer, [3, 4])
        return [*outcomes, *await store_all(gatherer, [5])]

    first, second, third = asyncio.run(run())
    assert isinstance(first, StoreError)
    assert isinstance(second, StoreError)
    assert (third, written) == (None, [5])


def test_a_waiter_that_is_cancelled_costs_nobody_an_answer(writer, written) -> None:
    async def run() -> None:
        gatherer = AnswerGatherer(writer)
        with gatherer.expecting(), gatherer.expecting(), gatherer.expecting():
            cancelled, kept = (asyncio.create_task(gatherer.store(*answer(start, 2))) for start in (0, 2))
            await asyncio.sleep(0)
            cancelled.cancel()
        await kept

    asyncio.run(run())
    assert written == [4]


def test_small_parts_of_one_writer_become_one(cache):
    writer = cache.open(RANGE).open_writer()
    for song_id in range(64):
        writer.write([CachedRows.of([song_id], hashes_of([song_id]), vectors_of([song_id]))])
    assert len(names(cache)) == len(writer.files) == 1
    assert sorted(content_of(cache.open(RANGE))) == list(range(64))


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"ARROW1")])
def test_a_small_part_that_the_disk_changed_ends_the_range_with_words(cache, harm):
    writer = cache.open(RANGE).open_writer()
    for song_id in range(63):
        writer.write([CachedRows.of([song_id], hashes_of([song_id]), vectors_of([song_id]))])
    harm(cache.storage.root / RANGE.key / writer.files[7].name)
    with pytest.raises(StoreError, match=r"was changed since this run wrote it \(.+\): check the disk"):
        writer.write([CachedRows.of([63], hashes_of([63]), vectors_of([63]))])


def test_a_write_that_the_disk_refuses_is_told_and_the_next_one_goes_on(cache, monkeypatch):
    put(cache, [1, 2])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StoreError, match=r"No space left.*make room"):
            put(cache, [3])
    put(cache, [3])
    assert sorted(content_of(cache.open(RANGE))) == [1, 2, 3]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_a_part_is_whole_and_synced_before_a_write_returns(cache, monkeypatch):
    """Looks at fsync itself: no test can cut the power."""
    synced = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor)))

    monkeypatch.setattr(os, "fsync", fsync)
    put(cache, [1, 2])
    (_, written), (folder, _) = synced
    (path,) = (cache.storage.root / RANGE.key).iterdir()
    assert (written.st_ino, written.st_size) == (path.stat().st_ino, path.stat().st_size)
    assert folder == path.parent, "a new file's name must be on disk too"


def test_a_writer_names_its_files_after_their_generation(cache):
    writer = PartWriter(cache.storage, cache.identity(RANGE), 3)
    writer.write([CachedRows.of([1], hashes_of([1]), vectors_of([1]))])
    assert writer.files[0].name.startswith("3-")
    assert writer.files[0].n_bytes == cache.look(RANGE).sizes[writer.files[0].name]
