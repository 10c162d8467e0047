"""The bytes of a part: what was written is read back, and whatever a disk changes is found."""

import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from songvec_assets.cache.parts import PIECE_ROWS, CachedRows, DamagedPartError, PartIdentity, open_part, write_part
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import hash_text

IDENTITY = PartIdentity("a/model", 3, SongIdRange(0, 10_000))


def make(n_rows, identity=IDENTITY, seed=0):
    """A part's bytes, and its vectors."""
    vectors = np.random.default_rng(seed).normal(size=(n_rows, identity.dimensions)).astype(np.float32)
    rows = CachedRows.of(range(n_rows), [hash_text(str(song_id)) for song_id in range(n_rows)], vectors)
    file = io.BytesIO()
    write_part(file, identity, rows, (vectors[at : at + PIECE_ROWS] for at in range(0, n_rows, PIECE_ROWS)))
    return file.getvalue(), vectors


def read(content, identity=IDENTITY):
    return open_part(pa.py_buffer(bytes(content)), identity, "part.arrow")


@pytest.mark.parametrize("n_rows", [1, 5, PIECE_ROWS + 3])
def test_a_part_is_read_back_in_batches_of_bounded_size(n_rows):
    content, vectors = make(n_rows)
    batches = read(content)
    assert all(len(each) <= PIECE_ROWS for each in batches)
    np.testing.assert_array_equal(np.concatenate([each.song_ids for each in batches]), np.arange(n_rows))
    np.testing.assert_array_equal(np.concatenate([each.embeddings for each in batches]), vectors)
    assert all(each.find_sound().all() for each in batches)


def test_vectors_are_mapped_and_not_copied(tmp_path):
    (tmp_path / "part").write_bytes(make(50)[0])
    before = pa.total_allocated_bytes()
    (batch,) = open_part(pa.memory_map(str(tmp_path / "part")).read_buffer(), IDENTITY, "part")
    assert not batch.embeddings.flags.owndata
    assert pa.total_allocated_bytes() == before


FLIP_EVERY_BYTE = """
import sys
from songvec_assets_tests.cache.test_parts import make, read
from songvec_assets.cache.parts import DamagedPartError
from songvec_assets.errors import StoreError

whole, vectors = make(4)
for position in range(len(whole)):
    content = bytearray(whole)
    content[position] ^= 1 << position % 8
    print(position, end=" ", flush=True)
    try:
        batches = read(content)
    except StoreError:
        print("damaged")
        continue
    except DamagedPartError as error:
        batches = error.sound
    for rows in batches:
        rows = rows.take(rows.find_sound().nonzero()[0])
        right = all((vectors[song_id] == vector).all() for song_id, vector in zip(rows.song_ids, rows.embeddings))
        print("well" if right and len(rows) >= 3 else "something else was found")
    if not batches:
        print("damaged")
"""


def test_a_flipped_bit_anywhere_costs_a_vector_or_the_part_and_nothing_else_is_found():
    """Never a dead process, a library's panic, or a vector that nobody stored."""
    command = [sys.executable, "-W", "ignore", "-c", FLIP_EVERY_BYTE]
    reader = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = reader.stdout.splitlines()
    assert reader.returncode == 0, f"ended with {reader.returncode} after byte {lines[-1]} was flipped"
    assert [line for line in lines if not line.endswith((" well", " damaged"))] == []
    assert len(lines) == len(make(4)[0])


def test_a_part_cut_at_any_byte_is_damaged():
    content, _ = make(4)
    for size in range(len(content)):
        with pytest.raises(DamagedPartError):
            read(content[:size])


@pytest.mark.parametrize(
    "other",
    [
        PartIdentity("another/model", 3, IDENTITY.range),
        PartIdentity("a/model", 4, IDENTITY.range),
        PartIdentity("a/model", 3, SongIdRange(10_000, 20_000)),
    ],
)
def test_a_part_of_another_model_size_or_range_is_refused_as_such(other):
    with pytest.raises(StoreError, match=r"part\.arrow holds .* expected .*move it away"):
        read(make(4)[0], other)


def test_a_part_of_a_later_format_is_refused_and_not_taken_for_damaged():
    content, _ = make(4)
    assert content.count(b'"format": "1"') == 2
    with pytest.raises(StoreError, match="has format 2, expected 1: another version of songvec wrote it"):
        read(content.replace(b'"format": "1"', b'"format": "2"'))


def test_what_is_sound_of_a_damaged_part_is_told():
    n_rows = 2 * PIECE_ROWS
    content, vectors = make(n_rows)
    for spoilt, n_sound in (
        (content[:-1], n_rows),
        (content.replace(hash_text("7"), bytes(16)), n_rows - 1),
        (content[: len(content) // 2 + 1_000], PIECE_ROWS),
    ):
        with pytest.raises(DamagedPartError) as caught:
            read(spoilt)
        song_ids = np.concatenate([each.song_ids for each in caught.value.sound])
        assert len(song_ids) == n_sound
        np.testing.assert_array_equal(np.concatenate([e.embeddings for e in caught.value.sound]), vectors[song_ids])
