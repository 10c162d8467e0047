"""Texts to bytes, and response bytes to a float32 matrix: what is right comes bit for bit, what is wrong never."""

import base64
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from songvec_assets.embedding.wire import (
    MalformedResponseError,
    decode_response,
    encode_request,
    find_bad_vectors,
)

MANY = 10_000

PROFILE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ANY = st.floats(width=32)


def decode(body, n_texts, dimensions=MANY):
    """An answer whose vectors are not cut."""
    return decode_response(body, n_texts, dimensions)


def matrices(values=FINITE):
    """Float32 matrices of one to six vectors."""
    shapes = st.tuples(st.integers(1, 6), st.integers(1, 9))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=values))


def good_matrices():
    return matrices().filter(lambda matrix: matrix.any(axis=1).all())


def in_base64(vector):
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def in_floats(vector):
    return [float(value) for value in vector]


def body_of(items, **fields):
    data = [{"object": "embedding", "index": index, "embedding": embedding} for index, embedding in items]
    return json.dumps({"object": "list", "model": "m", "data": data, **fields}).encode()


@PROFILE
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.sampled_from([None, 8, 4096]))
def test_a_request_is_json_of_exactly_what_was_asked(texts, dimensions):
    asked = json.loads(encode_request("fireworks/qwen", texts, "base64", dimensions))
    expected = {"model": "fireworks/qwen", "input": texts, "encoding_format": "base64"}
    assert asked == (expected if dimensions is None else {**expected, "dimensions": dimensions})


def test_a_request_takes_any_sequence_of_texts_and_names_no_format_for_floats():
    """Some servers refuse the field whatever it holds; floats are what they give without it."""
    expected = {"model": "m", "input": ["a", "海"], "dimensions": 1}
    assert json.loads(encode_request("m", ("a", "海"), "float", 1)) == expected
    assert "海".encode() in encode_request("m", ["海"], "float", None), "not as an escape of twice the size"


@pytest.mark.parametrize("encode", [in_base64, in_floats])
@PROFILE
@given(matrix=good_matrices(), data=st.data())
def test_every_vector_comes_back_bit_for_bit_at_its_texts_place(encode, matrix, data):
    order = data.draw(st.permutations(range(len(matrix))))
    body = body_of(((index, encode(matrix[index])) for index in order), usage={"prompt_tokens": 7})
    batch = decode(body, len(matrix))
    assert batch.embeddings.dtype == np.float32
    assert batch.embeddings.tobytes() == matrix.tobytes()
    assert batch.n_tokens == 7


@PROFILE
@given(good_matrices())
def test_an_answer_that_mixes_both_encodings_is_refused(matrix):
    assume(len(matrix) > 1)
    encoded = [(in_floats if index % 2 else in_base64)(vector) for index, vector in enumerate(matrix)]
    with pytest.raises(MalformedResponseError, match="all vectors as base64 or all as arrays"):
        decode(body_of(enumerate(encoded)), len(matrix))


@pytest.mark.parametrize("first", [in_base64, in_floats])
def test_one_vector_of_another_kind_is_enough_to_refuse_an_answer(first):
    other = in_floats if first is in_base64 else in_base64
    values = [first([1.0, 2.0]), first([1.0, 2.0]), other([1.0, 2.0])]
    with pytest.raises(MalformedResponseError, match="all vectors as base64 or all as arrays"):
        decode(body_of(enumerate(values)), 3)


SPACES = st.text(" \t\r\n", max_size=3)


@PROFILE
@given(good_matrices(), st.data())
def test_numbers_are_read_in_every_spelling_that_json_allows(matrix, data):
    """Any white space around them, and any of the ways to write an exponent."""

    def spell(value):
        exact = float(value)
        spelling = data.draw(st.sampled_from([repr, "{:.17e}".format, "{:.17E}".format, "{:.25e}".format]))
        return data.draw(SPACES) + spelling(exact) + data.draw(SPACES)

    items = ", ".join(
        f'{{"index": {index}, "embedding":{data.draw(SPACES)}[{",".join(map(spell, vector))}]{data.draw(SPACES)}}}'
        for index, vector in enumerate(matrix)
    )
    body = f'{{"data": [{items}]}}'.encode()
    np.testing.assert_array_equal(decode(body, len(matrix)).embeddings, matrix)


@pytest.mark.parametrize(
    ("array", "vector"),
    [
        ("[1e2, -2.5E+1, 3e-2]", [100, -25, 0.03]),
        ("[1, 0, -3]", [1, 0, -3]),
        ("[1234567890123456789, -9007199254740993]", [1234567890123456789, -9007199254740993]),
        ("[0.1000000000000000055511151231257827, 1]", [0.1, 1]),
        ("[1e-60, 1]", [0, 1]),
        ("[-1e-45, 3.4028234663852886e38]", [-1e-45, 3.4028234663852886e38]),
    ],
)
def test_numbers_become_the_nearest_float32(array, vector):
    body = f'{{"data": [{{"index": 0, "embedding": {array}}}]}}'.encode()
    np.testing.assert_array_equal(decode(body, 1).embeddings, np.array([vector], np.float32))


@PROFILE
@given(st.floats(-1, 1).filter(lambda value: np.float32(value) != 0))
def test_a_number_of_twice_the_precision_becomes_the_nearest_float32(value):
    """A model's own float64 output, or one of a server that renormalises, is not a float32 written out."""
    assert decode(body_of([(0, [value])]), 1).embeddings[0, 0] == np.float32(value)


@PROFILE
@given(good_matrices(), st.sets(st.sampled_from("/+="), min_size=1))
def test_base64_is_read_in_every_spelling_that_json_allows(matrix, escaped):
    """System.Text.Json writes "+" as "\\u002B", PHP writes "/" as "\\/"."""
    body = body_of((index, in_base64(vector)) for index, vector in enumerate(matrix)).decode()
    head, values = body.split('"data"')
    for character in escaped:
        values = values.replace(character, f"\\u{ord(character):04X}")
    spelled = f'{head}"data"{values}'.encode()
    assert json.loads(spelled) == json.loads(body)
    np.testing.assert_array_equal(decode(spelled, len(matrix)).embeddings, matrix)


def test_an_escaped_slash_is_a_slash():
    vector = np.float32([-1.5, np.finfo(np.float32).max, 3.0])
    body = body_of([(0, in_base64(vector))])
    assert b"/" in body
    np.testing.assert_array_equal(decode(body.replace(b"/", b"\\/"), 1).embeddings, [vector])


@pytest.mark.parametrize(
    "usage",
    [
        *({}, {"usage": None}, {"usage": {}}, {"usage": []}, {"usage": "9"}, {"usage": {"prompt_tokens": None}}),
        *({"usage": {"prompt_tokens": tokens}} for tokens in (0, -9, "nine", 9.5, [9])),
    ],
)
def test_a_server_that_does_not_say_what_it_billed_billed_0(usage):
    """Its vectors are kept, since they are paid for: a retry would pay for them again."""
    assert decode(body_of([(0, [1.0])], **usage), 1).n_tokens == 0


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": "9"}, {"prompt_tokens": 9.0}, {"total_tokens": 9}, {"prompt_tokens": None, "total_tokens": 9}],
)
def test_what_was_billed_is_read_in_every_form(usage):
    assert decode(body_of([(0, [1.0])], usage=usage), 1).n_tokens == 9


@pytest.mark.parametrize(
    ("named", "order"),
    [
        ([None, 1, 2], [0, 1, 2]),
        ([2, None, 1], [2, 0, 1]),
        ([0, 1, None], [0, 1, 2]),
        ([None, None, None], [0, 1, 2]),
        ([None], [0]),
    ],
    ids=str,
)
def test_an_index_that_is_left_out_is_the_one_that_no_other_has(named, order):
    """Gemini leaves out what is 0; where none is named, the vectors are in the order of the texts."""
    data = [
        {"embedding": [1.0 + place]} | ({} if index is None else {"index": index}) for place, index in enumerate(named)
    ]
    batch = decode(json.dumps({"data": data}).encode(), len(named))
    assert [batch.embeddings[index, 0] for index in order] == [1.0 + place for place in range(len(named))]


@pytest.mark.parametrize("named", [[None, None, 2], [None, 0, 0], [None, 3, 1], [None, 1], [None, -1, 1]], ids=str)
def test_indexes_that_are_left_out_and_do_not_follow_are_refused(named):
    data = [{"embedding": [1.0]} | ({} if index is None else {"index": index}) for index in named]
    with pytest.raises(MalformedResponseError, match="each index from 0 to 2 once"):
        decode(json.dumps({"data": data}).encode(), 3)


@PROFILE
@given(st.integers(1, 6), st.lists(st.integers(-2, 8), max_size=8))
def test_an_index_that_is_missing_twice_or_foreign_is_refused(n_texts, order):
    assume(sorted(order) != list(range(n_texts)))
    body = body_of((index, [1.0, 2.0]) for index in order)
    with pytest.raises(MalformedResponseError, match=f"each index from 0 to {n_texts - 1} once"):
        decode(body, n_texts)


@PROFILE
@given(matrices(ANY | st.just(0.0)))
def test_vectors_that_are_zero_or_not_finite_are_named_and_the_others_hold(matrix):
    bad = [row for row, vector in enumerate(matrix) if not np.isfinite(vector).all() or not vector.any()]
    good = [row for row in range(len(matrix)) if row not in bad]
    batch = decode(body_of(enumerate(map(in_base64, matrix))), len(matrix))
    assert batch.bad == tuple(bad)
    assert batch.embeddings[good].tobytes() == matrix[good].tobytes()
    assert np.isnan(batch.embeddings[bad]).all()


@pytest.mark.parametrize(
    "value", ["null", "[null, null]", "[1.0, null]", "[NaN, 1.0]", "[-Infinity, 1.0]", "[1e300, 1.0]"]
)
def test_a_vector_that_holds_no_numbers_is_named_and_its_neighbours_hold(value):
    """text-embeddings-inference writes null (#644), Python's own encoder NaN."""
    body = b'{"data": [{"index": 1, "embedding": [3.0, 4.0]}, {"index": 0, "embedding": %s}]}' % value.encode()
    batch = decode(body, 2)
    assert batch.bad == (0,)
    assert batch.embeddings[1].tolist() == [3.0, 4.0]
    alone = decode(b'{"data": [{"index": 0, "embedding": %s}]}' % value.encode(), 1)
    assert alone.bad == (0,)


@PROFILE
@given(matrices(ANY))
def test_bad_vectors_are_found_even_where_a_sum_of_squares_would_over_or_underflow(matrix):
    expected = [row for row, vector in enumerate(matrix) if not np.isfinite(vector).all() or not vector.any()]
    assert find_bad_vectors(matrix) == expected


@pytest.mark.parametrize("encode", [in_base64, in_floats])
def test_vectors_of_unequal_size_are_refused(encode):
    with pytest.raises(MalformedResponseError, match=r"\b2\b.*\b3\b"):
        decode(body_of([(0, encode([1.0, 2.0])), (1, encode([1.0, 2.0, 3.0]))]), 2)


@pytest.mark.parametrize("encode", [in_base64, in_floats])
def test_vectors_of_unequal_size_are_refused_though_the_sum_of_their_sizes_fits(encode):
    sizes = [[1.0, 2.0], [1.0, 2.0, 3.0], [1.0]]
    with pytest.raises(MalformedResponseError, match="values"):
        decode(body_of(enumerate(map(encode, sizes))), 3)


@pytest.mark.parametrize("number", ["1e300", "-1e39", "NaN", "Infinity"])
def test_a_number_that_float32_does_not_hold_makes_a_bad_vector(number):
    body = b'{"data": [{"index": 0, "embedding": [0.5, %s]}]}' % number.encode()
    assert decode(body, 1).bad == (0,)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"<html>502 Bad Gateway</html>",
        b"\xff\xfe",
        b'{"data": null}',
        b'{"data": []}',
        b'{"data": [{"index": 0}]}',
        b'{"data": [{"index": "0", "embedding": [1.0]}]}',
        b'{"data": [{"index": 0, "embedding": {}}]}',
        b'{"data": [{"index": 0, "embedding": [0.5, 1e999]}]}',
        b'{"data": [{"index": 0, "embedding": [[1.0]]}]}',
        b'{"data": [{"index": 0, "embedding": ["1.0"]}]}',
        b'{"data": [{"index": 0, "embedding": ["1.0", "2.0"]}]}',
        b'{"data": [{"index": 0, "embedding": ["1.0,2.0"]}]}',
        b'{"data": [{"index": 0, "embedding": [true, 1.0]}]}',
        b'{"data": [{"index": 0, "embedding": [1.0, [2.0]]}]}',
        b'{"data": [{"index": 0, "embedding": [{"a": 1.0}]}]}',
        b'{"data": [{"index": 0, "embedding": [1.0, 2.0,]}]}',
        b'{"data": [{"index": 0, "embedding": [1.0,, 2.0]}]}',
        b'{"data": [{"index": 0, "embedding": [1.0 2.0]}]}',
        b'{"data": [{"index": 0, "embedding": [1 0]}]}',
        b'{"data": [{"index": 0, "embedding": [0x10]}]}',
        b'{"data": [{"index": 0, "embedding": [123456789012345678901234567890]}]}',
        b'{"data": [{"index": 0, "embedding": [[]]}]}',
        b'{"data": [{"index": 0, "embedding": [[1.0], [2.0]]}]}',
        b'{"data": [{"index": 0, "embedding": [1.0, {}]}]}',
        b'{"data": [{"index": 0, "embedding": [ ]}]}',
        b'{"data": [{"index": 0, "embedding": 1.0}]}',
        b'{"data": [{"index": 0, "embedding": true}]}',
        b'{"data": [{"index": 0, "embedding": []}]}',
        b'{"data": [{"index": 0, "embedding": ""}]}',
        b'{"data": [{"index": 0, "embedding": "AACAP"}]}',
        b'{"data": [{"index": 0, "embedding": "AAC!APw=="}]}',
        b'{"data": [{"index": 0, "embedding": "AACA"}]}',
        '{"data": [{"index": 0, "embedding": "é"}]}'.encode(),
        b'{"error": {"message": "overloaded"}}',
    ],
)
def test_what_is_no_embeddings_response_is_refused(body):
    with pytest.raises(MalformedResponseError):
        decode(body, 1)


@pytest.mark.parametrize("encode", [in_base64, in_floats])
@PROFILE
@given(matrix=good_matrices(), data=st.data())
def test_a_response_that_breaks_off_is_refused(encode, matrix, data):
    body = body_of(enumerate(map(encode, matrix)))
    with pytest.raises(MalformedResponseError):
        decode(body[: data.draw(st.integers(0, len(body) - 1))], len(matrix))


@PROFILE
@given(
    hnp.arrays(np.float32, (3, 8), elements=st.floats(0.125, 1000, width=32)),
    st.integers(1, 8),
)
def test_vectors_are_cut_to_their_first_values_at_unit_length(matrix, dimensions):
    for encode in (in_base64, in_floats):
        batch = decode(body_of(enumerate(map(encode, matrix))), 3, dimensions)
        assert (batch.embeddings.shape, batch.n_values) == ((3, dimensions), 8)
        assert batch.embeddings.dtype == np.float32
        assert batch.embeddings.flags.c_contiguous
        cut = matrix[:, :dimensions].astype(float)
        expected = cut if dimensions == 8 else [vector / np.sqrt(np.square(vector).sum()) for vector in cut]
        np.testing.assert_allclose(batch.embeddings, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("vector", "bad"), [([1, 0, np.nan], True), ([1, 0, np.inf], True), ([0, 0, 1], True), ([1, 0, 0], False)]
)
def test_a_vector_is_bad_for_what_is_cut_off_and_where_nothing_is_left(vector, bad):
    for encode in (in_base64, in_floats) if np.isfinite(vector).all() else (in_base64,):
        batch = decode(body_of([(0, encode(vector)), (1, encode([0, 2, 0]))]), 2, 2)
        assert batch.bad == ((0,) if bad else ())
        assert batch.embeddings[1].tolist() == [0, 1]
