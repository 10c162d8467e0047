"""Parts read by ranges from a real S3 server: the same rows as from a disk, by few requests, whatever is damaged."""

from functools import partial

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from msgspec.structs import replace

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cache.parts import PIECE_ROWS, CachedRows, DamagedPartError, PartIdentity, open_part
from songvec_assets.cache.slices import RemoteRows, open_stored, read_ahead
from songvec_assets.cache.writing import PartWriter
from songvec_assets.errors import StorageError, StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage import Opened, open_storage
from songvec_assets.storage.local import LocalStorage
from songvec_assets.storage.opened import HEAD_BYTES

RANGE = SongIdRange(0, 10_000)
DIMENSIONS = 129
IDENTITY = PartIdentity("m", DIMENSIONS, RANGE)


def batch_of(song_ids, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(len(song_ids), DIMENSIONS)).astype(np.float32)
    return CachedRows.of(song_ids, [number.to_bytes(16, "little") for number in song_ids], vectors)


def write(storage, batches):
    """Write batches as a part; its key."""
    writer = PartWriter(storage, IDENTITY, 0)
    writer.write(batches)
    return f"{RANGE.key}/{writer.files[0].name}"


@pytest.fixture
def storage(bucket):
    return open_storage(bucket)


# odd numbers of rows and values: then columns are padded
BATCHES = {
    "one": [batch_of(range(1999))],
    "many": [batch_of(range(PIECE_ROWS)), batch_of(range(3000, 3001)), batch_of(range(4000, 5555))],
    "small": [batch_of(range(17))],
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_a_part_in_an_object_store_has_the_rows_that_were_written(storage, batches):
    stored = open_stored(storage.open(write(storage, batches)), IDENTITY, "part")
    assert len(stored) == len(batches)
    for found, written in zip(stored, batches, strict=True):
        for rows in (found, found.load()):
            np.testing.assert_array_equal(rows.song_ids, written.song_ids)
            np.testing.assert_array_equal(rows.text_hashes, written.text_hashes)
            np.testing.assert_array_equal(rows.checksums, written.checksums)
        assert found.load().find_sound().all()
        np.testing.assert_array_equal(found.load().embeddings, written.embeddings)
        positions = np.array([len(found) - 1, 0, 0, len(found) // 2])
        np.testing.assert_array_equal(found.vectors_at(positions), written.embeddings[positions])
        np.testing.assert_array_equal(found.take(slice(1, 5)).embeddings, written.embeddings[1:5])
        assert found.take(np.array([], np.int64)).embeddings.shape == (0, DIMENSIONS)


def test_opening_reads_no_vector_and_a_batch_is_one_request(storage, s3, monkeypatch):
    batches = [batch_of(range(number * PIECE_ROWS, (number + 1) * PIECE_ROWS)) for number in range(4)]
    key = write(storage, batches)
    s3.requests()
    content = storage.open(key)
    sent = []
    monkeypatch.setattr(type(content), "read", _counting(type(content).read, sent))
    stored = open_stored(content, IDENTITY, "part")
    assert all(isinstance(each, RemoteRows) for each in stored)
    # the head, the end, and the narrow columns of each batch but the first; all are near each other here
    assert s3.count()["GET"] <= 2 + len(batches)
    assert sum(sent) < content.size / 4
    stored[2].load()
    assert s3.count() == {"GET": 1}


def test_the_vectors_of_a_base_are_read_a_batch_at_a_time_and_once(storage, s3):
    n_batches, dimensions = 5, 512
    cache = ModelCache(storage, "m", dimensions)
    vectors = np.random.default_rng(0).normal(size=(n_batches * PIECE_ROWS, dimensions)).astype(np.float32)
    cached, song_ids = cache.open(RANGE), range(len(vectors))
    rows = CachedRows.of(song_ids, [number.to_bytes(16, "little") for number in song_ids], vectors)
    base = cached.open_writer().write_base(rows, np.split(vectors, n_batches))
    cached.save(replace(cached.manifest, files=(base,)))
    opened = cache.open(RANGE)
    s3.requests()
    found = list(opened.iter_vectors(opened.rows["row"]))
    np.testing.assert_array_equal(np.concatenate([each.embeddings for each in found]), vectors)
    answered = [each["n_bytes"] for each in s3.requests()]
    assert max(answered) <= PIECE_ROWS * 4 * dimensions
    assert sum(answered) == vectors.nbytes


def _counting(read, sent):
    def count(opened, spans):
        sent.extend(stop - start for start, stop in spans if stop > HEAD_BYTES)
        return read(opened, spans)

    return count


@pytest.mark.parametrize("at", [100, HEAD_BYTES + 100, -12, -500], ids=["head", "vectors", "end", "footer"])
def test_a_damaged_part_gives_the_same_rows_as_on_a_disk(storage, tmp_path, at):
    disk = LocalStorage(tmp_path)
    key = write(disk, [batch_of(range(PIECE_ROWS)), batch_of(range(3000, 3500))])
    content = bytearray(disk.open(key).mapped.to_pybytes())
    content[at] ^= 4
    found = []
    for each in (disk, storage):
        each.put(key, bytes(content))
        try:
            batches, problem = open_stored(each.open(key), IDENTITY, "part"), ""
        except DamagedPartError as error:
            batches, problem = error.sound, str(error)
        rows = [batch.load() for batch in batches]
        found.append((problem, [(each.song_ids.tolist(), each.find_sound().tolist()) for each in rows]))
    assert found[0][1] == found[1][1]
    # nobody needs all of the footer, only the whole file does
    assert found[0][0] == found[1][0] or at == -12


class Remote(Opened):
    """Bytes that are read as those of an object store; what is outside of them is refused, as servers do."""

    mapped = None

    def __init__(self, content):
        self.content = content

    @property
    def size(self):
        return len(self.content)

    def read(self, spans):
        if not all(0 <= start < stop <= self.size for start, stop in spans):
            raise StorageError("416 Range Not Satisfiable")
        return [pa.py_buffer(self.content[start:stop]) for start, stop in spans]

    def file(self):
        raise NotImplementedError


def find_sound(do):
    """The song_ids of sound rows, or the code of the refusal."""
    try:
        batches = do()
    except DamagedPartError as error:
        batches = error.sound
    except StoreError as error:
        return error.code
    return {int(song_id) for rows in (each.load() for each in batches) for song_id in rows.song_ids[rows.find_sound()]}


def test_no_flipped_bit_of_a_part_is_more_than_damage(tmp_path):
    disk = LocalStorage(tmp_path)
    whole = disk.open(write(disk, [batch_of(range(1, 10)), batch_of(range(20, 25))])).mapped.to_pybytes()
    random = np.random.default_rng(5)
    for at in range(0, len(whole), 11):
        content = bytearray(whole)
        content[at] ^= 1 << int(random.integers(8))
        on_disk = find_sound(partial(open_part, pa.py_buffer(bytes(content)), IDENTITY, "part"))
        remote = find_sound(partial(open_stored, Remote(bytes(content)), IDENTITY, "part"))
        # nobody needs all of the footer, only the whole file does
        assert remote == on_disk or remote >= on_disk, at


def test_a_part_of_another_range_is_refused(storage):
    key = write(storage, [batch_of(range(1999))])
    with pytest.raises(StoreError, match="expected m, 129 dimensions"):
        open_stored(storage.open(key), PartIdentity("m", DIMENSIONS, SongIdRange(10_000, 20_000)), "part")


def test_a_range_reads_the_same_from_an_object_store_and_from_a_disk(storage, tmp_path):
    found = []
    for each in (LocalStorage(tmp_path), storage):
        cached = ModelCache(each, "m", DIMENSIONS).open(RANGE)
        for number in range(3):
            cached.open_writer().write([batch_of(range(number * 1000, number * 1000 + 1500), seed=number)])
        cached = ModelCache(each, "m", DIMENSIONS).open(RANGE)
        assert cached.find_sound(cached.rows).equals(cached.rows)
        picked = cached.rows["row"].gather([5, 3499, 3, 2000])
        vectors = [rows.embeddings for rows in cached.iter_vectors(cached.rows["row"])]
        order = pl.Series([tuple(each.song_ids.tolist()) for each in cached.iter_vectors(cached.rows["row"])])
        found.append((np.concatenate(vectors).tobytes(), cached.embeddings_at(picked).tobytes(), order.to_list()))
    assert sorted(found[0][2]) == sorted(found[1][2])
    assert (len(found[0][0]), found[0][1]) == (len(found[1][0]), found[1][1])


def test_rows_come_in_order_one_ahead_and_an_error_where_it_belongs():
    begun = []

    def reading(number):
        def read():
            begun.append(number)
            if number == 3:
                raise StoreError("no")
            return number

        return read

    rows = read_ahead(map(reading, range(5)))
    assert next(rows) == 0
    assert next(rows) == 1
    assert max(begun) <= 3
    assert next(rows) == 2
    with pytest.raises(StoreError):
        next(rows)
