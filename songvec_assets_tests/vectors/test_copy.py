"""The binary COPY format, decoded here by its documentation and by a real server."""

import itertools
import struct

import numpy as np
import psycopg2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import raw_cursor
from songvec_assets.vectors.copy import HEADER, TRAILER, CopyStream, encode_rows
from songvec_assets_tests.administration import execute

PROFILE = settings(deadline=None)
INT32 = st.integers(-(2**31), 2**31 - 1)
VALUES = {
    "vector": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "halfvec": st.floats(-65504, 65504, width=32),
}
CODES = {"vector": "f", "halfvec": "e"}


@st.composite
def tables(draw, vector_type, max_rows=6):
    """song_ids and embeddings, no rows among them."""
    n_rows, dimensions = draw(st.integers(0, max_rows)), draw(st.integers(1, 20))
    song_ids = np.array(draw(st.lists(INT32, min_size=n_rows, max_size=n_rows)), dtype=np.int32)
    return song_ids, draw(hnp.arrays(np.float32, (n_rows, dimensions), elements=VALUES[vector_type]))


def read_all(chunks):
    return b"".join(iter(CopyStream(chunks).read, b""))


def decode(stream, code):
    """Rows by PostgreSQL's "Binary Format" and pgvector's vector_recv, halfvec_recv: each field read on its own."""
    assert stream[:11] == b"PGCOPY\n\xff\r\n\0"
    flags, extension = struct.unpack_from("!ii", stream, 11)
    assert (flags, extension) == (0, 0)
    at, rows = 19, []
    while (n_fields := struct.unpack_from("!h", stream, at)[0]) != -1:
        id_bytes, song_id, vector_bytes, dimensions, unused = struct.unpack_from("!iiihh", stream, at + 2)
        assert (n_fields, id_bytes, unused) == (2, 4, 0)
        values = struct.unpack_from(f"!{dimensions}{code}", stream, at + 18)
        assert vector_bytes == 4 + struct.calcsize(f"!{dimensions}{code}")
        rows.append((song_id, values))
        at += 14 + vector_bytes
    assert at + 2 == len(stream), "nothing follows the trailer"
    return rows


def encode(song_ids, embeddings, vector_type="vector"):
    return encode_rows([(song_ids, embeddings)], embeddings.shape[1], vector_type)


@pytest.mark.parametrize("vector_type", ["vector", "halfvec"])
@PROFILE
@given(data=st.data())
def test_rows_decode_to_what_was_encoded(vector_type, data):
    song_ids, embeddings = data.draw(tables(vector_type))
    stream = read_all(encode(song_ids, embeddings, vector_type))
    value_type = {"vector": np.float32, "halfvec": np.float16}[vector_type]
    decoded = decode(stream, CODES[vector_type])
    assert [song_id for song_id, _ in decoded] == song_ids.tolist()
    for (_, values), embedding in zip(decoded, embeddings, strict=True):
        assert np.array(values, dtype=value_type).tobytes() == embedding.astype(value_type).tobytes()


def test_a_row_has_these_bytes():
    """Written out by hand once, so that encoder and decoder cannot be wrong together."""
    chunks = list(encode(np.array([258], dtype=np.int32), np.array([[1.0, -2.0]], dtype=np.float32)))
    assert b"".join(chunks).hex(" ", 2) == "0002 0000 0004 0000 0102 0000 000c 0002 0000 3f80 0000 c000 0000"


def test_rows_of_many_chunks_keep_their_order_and_no_chunk_is_above_128_kib():
    song_ids = np.arange(700, dtype=np.int32)
    embeddings = np.repeat(np.arange(700, dtype=np.float32)[:, None], 2000, axis=1)
    chunks = list(encode(song_ids, embeddings))
    assert len(chunks) == 44
    assert max(map(len, chunks)) <= 1 << 17
    decoded = decode(read_all(chunks), "f")
    assert [(song_id, values[0], values[-1]) for song_id, values in decoded] == [(each,) * 3 for each in range(700)]


@pytest.mark.parametrize("vector_type", ["vector", "halfvec"])
def test_a_chunk_that_was_handed_out_does_not_change_when_the_next_is_made(vector_type):
    song_ids, embeddings = np.arange(100, dtype=np.int32), np.ones((100, 2000), dtype=np.float32)
    chunks = encode(song_ids, embeddings, vector_type)
    first = next(chunks)
    kept = bytes(memoryview(first))
    assert next(chunks) != first == kept


@PROFILE
@given(st.lists(st.binary(max_size=50), max_size=40))
def test_a_stream_is_header_chunks_and_trailer(chunks):
    """Also where a chunk is empty: that is not the stream's end."""
    assert read_all(chunks) == b"PGCOPY\n\xff\r\n\0" + bytes(8) + b"".join(chunks) + b"\xff\xff"


def test_a_stream_stays_at_its_end():
    stream = CopyStream([])
    assert list(iter(stream.read, b"")) == [HEADER, TRAILER]
    assert stream.read(10) == stream.read() == b""


def test_a_chunk_is_made_when_it_is_asked_for():
    """Nothing is made for a COPY that the server refuses."""
    made = itertools.count()
    stream = CopyStream(b"x" * next(made) for _ in range(10))
    assert stream.read() == HEADER
    assert next(made) == 0
    assert [stream.read(), stream.read()] == [b"x", b"xx"]


def test_what_the_chunks_raise_comes_after_the_chunks_before_it():
    def chunks():
        yield b"row"
        raise KeyError("damaged")

    stream = CopyStream(chunks())
    assert [stream.read(), stream.read()] == [HEADER, b"row"]
    with pytest.raises(KeyError, match="damaged"):
        stream.read()
    assert isinstance(stream.error, KeyError)


HALF_STEPS = np.float32([1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 1.5 * 2**-24, 65504, -65504, 6.1e-5, 1 / 3])
EDGES = {
    "vector": np.float32([0, -0.0, 1e-45, -1.1754944e-38, np.finfo(np.float32).max, -1 / 3, 16777217, 1]),
    "halfvec": HALF_STEPS,
}


def copy(cursor, chunks):
    cursor.copy_expert("COPY copied FROM STDIN (FORMAT binary)", CopyStream(chunks))


@pytest.mark.parametrize("vector_type", ["vector", "halfvec"])
def test_the_server_stores_every_value_as_it_was_sent(database, vector_type):
    random = np.random.default_rng(0)
    n_rows, dimensions = 1200, 250  # more than one chunk
    song_ids = random.choice(np.arange(-(2**31), 2**31 - 1, 997, dtype=np.int32), n_rows, replace=False)
    embeddings = random.normal(size=(n_rows, dimensions)).astype(np.float32)
    embeddings[:8, 0] = embeddings[7, :8] = EDGES[vector_type]
    with database.get_connection() as connection:
        connection.execute(text(f"CREATE TABLE copied (song_id integer, embedding {vector_type}({dimensions}))"))
        with raw_cursor(connection) as cursor:
            copy(cursor, encode(song_ids, embeddings, vector_type))
        rows = connection.execute(text("SELECT song_id, embedding::real[] FROM copied")).all()
    assert [song_id for song_id, _ in rows] == song_ids.tolist()
    stored = np.array([values for _, values in rows], dtype=np.float32)
    sent = embeddings if vector_type == "vector" else embeddings.astype(np.float16).astype(np.float32)
    assert stored.tobytes() == sent.tobytes()


def test_a_halfvec_is_rounded_as_the_server_itself_rounds(database):
    random = np.random.default_rng(0)
    embeddings = np.concatenate([HALF_STEPS[None], random.normal(size=(50, 8)).astype(np.float32)])
    song_ids = np.arange(len(embeddings), dtype=np.int32)
    with database.get_connection() as connection:
        connection.execute(text("CREATE TABLE copied (song_id integer, embedding halfvec(8))"))
        with raw_cursor(connection) as cursor:
            copy(cursor, encode(song_ids, embeddings, "halfvec"))
        for song_id, embedding in zip(song_ids.tolist(), embeddings.tolist(), strict=True):
            found = connection.scalar(
                text("SELECT embedding = CAST(CAST(:values AS real[]) AS halfvec) FROM copied WHERE song_id = :id"),
                {"values": embedding, "id": song_id},
            )
            assert found is True, f"song_id {song_id}: {embedding}"


def make_rows(n_rows, dimensions=2000):
    return np.arange(n_rows, dtype=np.int32), np.ones((n_rows, dimensions), dtype=np.float32)


def test_what_the_chunks_raise_ends_the_copy_and_stores_nothing(database):
    def chunks():
        yield from encode(*make_rows(100))
        raise KeyError("damaged")

    with database.get_connection() as connection:
        connection.execute(text("CREATE TABLE copied (song_id integer PRIMARY KEY, embedding vector(2000))"))
        with raw_cursor(connection) as cursor:
            cursor.execute("SAVEPOINT before_copy")
            stream = CopyStream(chunks())
            with pytest.raises(psycopg2.Error):
                cursor.copy_expert("COPY copied FROM STDIN (FORMAT binary)", stream)
            assert isinstance(stream.error, KeyError)
            cursor.execute("ROLLBACK TO SAVEPOINT before_copy")
        assert connection.scalar(text("SELECT count(*) FROM copied")) == 0


@pytest.mark.parametrize("failure", ["another size", "no table", "the connection breaks"])
def test_a_copy_that_the_server_ends_is_an_error_of_ours(database, failure):
    n_made = itertools.count()

    def chunks():
        for number in n_made:
            if failure == "the connection breaks" and number == 50:
                execute(database.adbc_uri, "SELECT pg_terminate_backend(%s, 5000)", (pid,))
            if failure == "another size" and number == 50:
                return
            yield from encode(*make_rows(8, 3))

    with pytest.raises(DatabaseError), database.get_connection() as connection:
        if failure != "no table":
            dimensions = 4 if failure == "another size" else 3
            connection.execute(text(f"CREATE TABLE copied (song_id integer, embedding vector({dimensions}))"))
        pid = connection.connection.driver_connection.info.backend_pid
        with raw_cursor(connection) as cursor:
            copy(cursor, chunks())
    if failure == "no table":
        assert next(n_made) == 0
