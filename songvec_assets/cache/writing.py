"""Writing parts: numbered files of one writer, into which answers are gathered.

A part is durable before anything says that its songs are stored. When to add here: another reason to write a part.
Keep out: which files are valid (`manifest`).
"""

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count

import numpy as np

from songvec_assets.cache.manifest import DataFile
from songvec_assets.cache.parts import (
    PIECE_ROWS,
    SMALL_ROWS,
    CachedRows,
    DamagedPartError,
    PartIdentity,
    Rows,
    StoredRows,
    join_rows,
    write_part,
)
from songvec_assets.cache.slices import open_stored
from songvec_assets.embedding.wire import Float32Matrix, find_bad_vectors
from songvec_assets.errors import StoreError
from songvec_assets.storage import Storage
from songvec_assets.threads import DaemonThreads

GATHER_S = 0.5
"""Seconds that an answer waits for others to share its part."""
_MOST_SMALL = 64
"""At this number, small parts are merged: a range must not have a file per song."""


@dataclass
class PartWriter:
    """Writes parts of a range, each durably or not at all. Several threads may write at a time.

    Attributes:
        storage: of the model.
        files: the written parts.
    """

    storage: Storage
    identity: PartIdentity
    generation: int
    files: list[DataFile] = field(default_factory=list)
    _writer: str = field(default_factory=lambda: uuid.uuid4().hex)
    _numbers: Iterator[int] = field(default_factory=count)
    _small: list[DataFile] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, batches: Sequence[CachedRows]) -> None:
        """Write songs with their vectors as one part.

        Raises:
            ValueError: a vector is zero, not finite, or of another size: nothing is written.
            StoreError: the disk refuses, or changed a part that was written before.
        """
        for each in batches:
            expected, shape = (len(each), self.identity.dimensions), each.embeddings.shape
            if shape != expected or find_bad_vectors(each.embeddings):
                raise ValueError(f"expected finite vectors other than zero of shape {expected}, got shape {shape}")
        rows = join_rows(batches)
        pieces = (each.embeddings[at : at + PIECE_ROWS] for each in batches for at in range(0, len(each), PIECE_ROWS))
        part, small = self._write(rows, pieces), []
        with self._lock:
            self.files.append(part)
            if len(rows) < SMALL_ROWS:
                self._small.append(part)
            if len(self._small) >= _MOST_SMALL:
                small, self._small = self._small, []
        if small:
            self._unite(small)

    def write_base(self, rows: Rows, pieces: Iterable[Float32Matrix]) -> DataFile:
        """Write stored rows as a base; they keep their checksums, so that damage is still found later."""
        return self._write(rows, pieces, "base")

    def _write(self, rows: Rows, pieces: Iterable[Float32Matrix], number: str = "") -> DataFile:
        name = f"{self.generation}-{self._writer}-{number or next(self._numbers)}.arrow"
        key = f"{self.identity.range.key}/{name}"
        with self.storage.write(key) as file:
            write_part(file, self.identity, rows, pieces)
            n_bytes = file.tell()
        return DataFile(name, n_bytes)

    def _unite(self, small: Sequence[DataFile]) -> None:
        """Write small parts again as one. A crash in between leaves duplicate rows, which are harmless."""
        keys = [f"{self.identity.range.key}/{each.name}" for each in small]
        batches = [rows for key in keys for rows in self._read(key)]
        part = self._write(join_rows(batches), (each.load().embeddings for each in batches))
        with self._lock:
            self.files = [*(each for each in self.files if each not in small), part]
        self.storage.delete(*keys)

    def _read(self, key: str) -> Sequence[StoredRows]:
        try:
            return open_stored(self.storage.open(key), self.identity, key)
        except (DamagedPartError, FileNotFoundError) as error:
            raise StoreError(
                f"{self.storage.describe(key)} was changed since this run wrote it ({error}): check the disk, "
                "then run again, which embeds again what is lost",
                "store.damaged",
            ) from error


Answer = tuple[Sequence[int], Sequence[bytes], Float32Matrix]
"""song_ids, text hashes and vectors."""


@dataclass
class AnswerGatherer:
    """Gathers the answers to a range's requests into parts: of PIECE_ROWS rows or more, or of half a second.

    Attributes:
        writer: writes the parts; in threads, as many at a time as its storage is worth.
    """

    writer: PartWriter
    _n_expected: int = 0
    _waiting: list[Answer] = field(default_factory=list)
    _part: asyncio.Task[None] | None = None
    _is_due: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._places = asyncio.Semaphore(self.writer.storage.n_writes)

    @contextlib.contextmanager
    def expecting(self, n_answers: int = 1) -> Iterator[None]:
        """Within the block answers may come that are worth waiting for."""
        self._n_expected += n_answers
        try:
            yield
        finally:
            self._n_expected -= n_answers
            self._check_due()

    async def store(self, song_ids: Sequence[int], text_hashes: Sequence[bytes], embeddings: Float32Matrix) -> None:
        """Store songs with their vectors; when this returns they are on disk.

        Raises:
            ValueError, StoreError: see `PartWriter.write`.
        """
        if self._part is None:
            self._is_due.clear()
            self._part = asyncio.create_task(self._write_when_due())
        self._waiting.append((song_ids, text_hashes, embeddings))
        self._check_due()
        # a waiter that is cancelled must not cost the others their answers
        await asyncio.shield(self._part)

    def _check_due(self) -> None:
        # an answer that waits holds a slot in flight: more than a quarter of them must not be idle, or, for a small
        # part, more than half
        n_waiting, n_rows = len(self._waiting), sum(len(each[0]) for each in self._waiting)
        n_idle = n_waiting if n_rows < SMALL_ROWS else 3 * n_waiting
        if n_idle >= self._n_expected or n_rows >= PIECE_ROWS:
            self._is_due.set()

    async def _write_when_due(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_due.wait(), GATHER_S)
        async with self._places:
            # also what came while earlier parts were written
            taken, self._waiting, self._part = self._waiting, [], None
            # their slots are free soon: what comes in them is worth waiting for, else parts would get ever smaller
            with self.expecting(len(taken)), DaemonThreads(1, "songvec-part") as thread:
                # not a thread of the loop's: these few serve the database, without which no request may be sent
                await asyncio.get_running_loop().run_in_executor(thread, self._write, taken)

    def _write(self, taken: Sequence[Answer]) -> None:
        """Write answers as one part, since each file costs a sync; small answers share a batch."""
        groups: list[list[Answer]] = []
        n_rows = PIECE_ROWS
        for answer in taken:
            n_rows += len(answer[0])
            if n_rows > PIECE_ROWS:
                groups.append([])
                n_rows = len(answer[0])
            groups[-1].append(answer)
        batches = []
        for group in groups:
            song_ids, text_hashes, embeddings = zip(*group, strict=True)
            # an answer that fills a batch is written as it is: joining would copy its 16 MB
            joined = embeddings[0] if len(group) == 1 else np.concatenate(embeddings)
            batches.append(CachedRows.of([*chain(*song_ids)], [*chain(*text_hashes)], joined))
        self.writer.write(batches)
