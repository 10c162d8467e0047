"""How parts come to be: numbered files of one writer, answers gathered into them, and merges.

A part is durable before anything says that its songs are stored. When to add here: another reason to write a part.
Keep out: which files hold, which is the manifest's.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from songvec_assets.cache.manifest import DataFile
from songvec_assets.cache.parts import PIECE_ROWS, CachedRows, PartIdentity, Rows, open_part, write_part
from songvec_assets.embedding.wire import Float32Matrix, find_bad_vectors
from songvec_assets.storage import Storage

GATHER_S = 0.5
"""For how long an answer waits for others to share its part."""
_MOST_SMALL = 64
"""So many parts of fewer rows than half a batch become one: a range must not have a file per song."""


@dataclass
class PartWriter:
    """Writes parts of a range, each whole and durable or not there.

    Attributes:
        storage, folder: where to.
        identity: of the parts.
        generation: of the parts.
        files: that were written, in order.
    """

    storage: Storage
    folder: str
    identity: PartIdentity
    generation: int
    files: list[DataFile] = field(default_factory=list)
    _writer: str = field(default_factory=lambda: uuid.uuid4().hex)
    _n_parts: int = 0
    _small: list[DataFile] = field(default_factory=list)

    def write(self, song_ids: Sequence[int], text_hashes: Sequence[bytes], embeddings: Float32Matrix) -> None:
        """Write songs with their vectors as one part.

        Raises:
            ValueError: a vector is zero, not finite, or of another size: nothing is written.
            StoreError: the disk refuses.
        """
        expected = (len(song_ids), self.identity.dimensions)
        if embeddings.shape != expected or find_bad_vectors(embeddings):
            raise ValueError(
                f"expected finite vectors other than zero of shape {expected}, got shape {embeddings.shape}"
            )
        pieces = (embeddings[start : start + PIECE_ROWS] for start in range(0, len(song_ids), PIECE_ROWS))
        part = self._write(Rows.of(song_ids, text_hashes, embeddings), pieces)
        if len(song_ids) < PIECE_ROWS // 2:
            self._small.append(part)
            if len(self._small) >= _MOST_SMALL:
                self._unite_small_parts()

    def write_base(self, rows: Rows, pieces: Iterator[Float32Matrix]) -> DataFile:
        """Write rows that were stored before as a base; they keep their checksums, so that damage is found later."""
        return self._write(rows, pieces, "base")

    def _write(self, rows: Rows, pieces: Iterator[Float32Matrix], number: str = "") -> DataFile:
        name = f"{self.generation}-{self._writer}-{number or self._n_parts}.arrow"
        key = f"{self.folder}/{name}"
        with self.storage.write(key) as file:
            write_part(file, self.identity, rows, pieces)
            n_bytes = file.tell()
        written = DataFile(name, n_bytes)
        if not number:
            self._n_parts += 1
            self.files.append(written)
        return written

    def _unite_small_parts(self) -> None:
        """Write small parts again as one. A crash in between leaves rows twice, which does no harm."""
        small, self._small = self._small, []
        batches: list[CachedRows] = []
        for each in small:
            content = self.storage.open(f"{self.folder}/{each.name}")
            batches += open_part(content, self.identity, each.name)
        columns = ((each.song_ids, each.text_hashes, each.checksums) for each in batches)
        rows = Rows(*(np.concatenate(column) for column in zip(*columns, strict=True)))
        self._write(rows, _regroup([each.embeddings for each in batches]))
        self.files = [each for each in self.files if each not in small]
        for each in small:
            self.storage.delete(f"{self.folder}/{each.name}")


def _regroup(matrices: Sequence[Float32Matrix]) -> Iterator[Float32Matrix]:
    """The same rows in pieces of PIECE_ROWS."""
    waiting: list[Float32Matrix] = []
    for each in matrices:
        if sum(map(len, waiting)) + len(each) > PIECE_ROWS:
            yield np.concatenate(waiting)
            waiting = []
        waiting.append(each)
    yield np.concatenate(waiting)


@dataclass
class AnswerGatherer:
    """Gathers the answers to a range's requests into parts of PIECE_ROWS rows, or of half a second.

    Attributes:
        writer: writes the parts; in a thread.
    """

    writer: PartWriter
    _n_expected: int = 0
    _waiting: list[tuple[Sequence[int], Sequence[bytes], Float32Matrix, asyncio.Future[None]]] = field(
        default_factory=list
    )
    _first_at: float = 0.0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _writing: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Within the block an answer may come that is worth waiting for."""
        self._n_expected += 1
        try:
            yield
        finally:
            self._n_expected -= 1
            self._changed.set()

    async def store(self, song_ids: Sequence[int], text_hashes: Sequence[bytes], embeddings: Float32Matrix) -> None:
        """Store songs with their vectors; when this returns they are on disk.

        Raises:
            ValueError, StoreError: see `PartWriter.write`.
        """
        stored = asyncio.get_running_loop().create_future()
        if not self._waiting:
            self._first_at = time.monotonic()
        self._waiting.append((song_ids, text_hashes, embeddings, stored))
        self._changed.set()
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_waiting())
        await stored

    async def _write_waiting(self) -> None:
        while self._waiting:
            while not self._is_due():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, self._first_at + GATHER_S - time.monotonic())):
                        await self._changed.wait()
            taken, self._waiting = self._waiting, []
            outcome: BaseException | None = None
            try:
                await asyncio.to_thread(self._write, taken)
            except BaseException as error:  # noqa: BLE001 - raised where each answer is awaited
                outcome = error
            for *_, stored in taken:
                if stored.done():  # whoever awaited it was cancelled
                    continue
                if outcome is None:
                    stored.set_result(None)
                else:
                    stored.set_exception(outcome)

    def _is_due(self) -> bool:
        n_rows = sum(len(song_ids) for song_ids, *_ in self._waiting)
        late = time.monotonic() >= self._first_at + GATHER_S
        # who waits holds a place in flight: more than half of them must not be idle
        return len(self._waiting) >= self._n_expected or n_rows >= PIECE_ROWS or late

    def _write(self, taken: list[tuple[Sequence[int], Sequence[bytes], Float32Matrix, asyncio.Future[None]]]) -> None:
        song_ids = [song_id for each in taken for song_id in each[0]]
        text_hashes = [text_hash for each in taken for text_hash in each[1]]
        self.writer.write(song_ids, text_hashes, np.concatenate([each[2] for each in taken]))
