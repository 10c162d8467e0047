"""Requests and responses of an OpenAI-compatible embeddings endpoint: texts to bytes, bytes to a float32 matrix. Pure.

Protocol as documented by OpenAI and Fireworks (read 2026-11): `data` is a list of {index, embedding}; an embedding is
base64 of little-endian float32, or a JSON array of numbers if the server does not support base64. No value becomes a
Python float.
When to add here: another form of a good answer. Keep out: what bad answers mean (`answers`).
"""

import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import pybase64
import simdjson
from numpy.typing import NDArray

from songvec_assets.errors import ProviderUnavailableError

Float32Matrix = NDArray[np.float32]


class MalformedResponseError(ProviderUnavailableError):
    """A 200 whose body does not have one vector per text. The request is retried, nothing is stored."""


@dataclass(frozen=True)
class EmbeddingBatch:
    """The vectors of one request.

    Attributes:
        embeddings: float32, (n texts, dimensions), in the order of the texts; NaN in the rows of `bad`.
        n_tokens: billed prompt tokens; 0 if the provider does not say.
        n_values: values per vector as received, before truncation to `dimensions`.
        n_bytes: of the response's body.
        bad: rows whose vector is zero, null or not finite.
        n_retries: bad answers before this one.
        n_limited: those of them with status 429.
    """

    embeddings: Float32Matrix
    n_tokens: int
    n_values: int = 0
    n_bytes: int = 0
    bad: tuple[int, ...] = ()
    n_retries: int = 0
    n_limited: int = 0


class _Request(msgspec.Struct, omit_defaults=True):
    model: str
    input: Sequence[str]
    encoding_format: str | None = None
    dimensions: int | None = None


class _Item(msgspec.Struct, gc=False):
    embedding: msgspec.Raw
    index: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    total_tokens: int | None = None


class _Response(msgspec.Struct):
    data: list[_Item]
    usage: msgspec.Raw = msgspec.Raw(b"null")


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some servers and gateways send it before their JSON."""
_NULL = b"null"
_HAS_OTHERS = re.compile(rb'.\[|[{"]|true|false', re.DOTALL)
_NOT_JSON = re.compile(rb"-?\b(?:NaN|Infinity)\b")

_decode_response = msgspec.json.Decoder(_Response).decode
_encode_request = msgspec.json.Encoder().encode


def encode_request(
    model: str, texts: Sequence[str], encoding_format: Literal["base64", "float"], dimensions: int | None
) -> bytes:
    """One request's JSON; without `dimensions` the server answers with the model's native size.

    The default format is floats. They are never requested by name: some servers refuse the field, whatever its value
    (litellm #42426, read 2026-11).
    """
    return _encode_request(_Request(model, texts, None if encoding_format == "float" else encoding_format, dimensions))


@np.errstate(over="ignore", invalid="ignore")  # values beyond float32, and vectors of zeros, are found as bad vectors
def decode_response(body: bytes, n_texts: int, dimensions: int) -> EmbeddingBatch:
    """Decode and check one response.

    A vector that is zero, null or not finite concerns only its text: its row is listed in `bad`, the others are valid.

    Args:
        body: the response's JSON.
        n_texts: texts that were sent.
        dimensions: longer vectors are truncated to their first values and normalized to unit length, as is right for
            Matryoshka-trained models.

    Raises:
        MalformedResponseError: not JSON of that shape, an index missing or twice, vectors of unequal size.
    """
    try:
        response = _decode_response(body.removeprefix(BYTE_ORDER_MARK))
    except msgspec.DecodeError as error:
        # Python's encoder writes NaN and Infinity, which are not JSON
        nulled = _NOT_JSON.sub(b"null", body)
        if nulled == body:
            raise MalformedResponseError(f"expected an embeddings response, got {body[:80]!r}: {error}") from error
        return decode_response(nulled, n_texts, dimensions)
    order = _fill_in([item.index for item in response.data], n_texts)
    if not order or sorted(order) != list(range(n_texts)):
        raise MalformedResponseError(f"expected each index from 0 to {n_texts - 1} once, got {_shorten(order)}")
    try:
        # one view at a time: thousands of them would trigger the garbage collector
        values = (memoryview(item.embedding) for item in response.data)
        embeddings, n_values = _stack(zip(order, values, strict=True), n_texts, dimensions)
    # simdjson raises TypeError for values that are not numbers, and RuntimeError for integers of over 64 bits
    except (msgspec.DecodeError, TypeError, ValueError, RuntimeError) as error:
        raise MalformedResponseError(f"expected an embeddings response, got {body[:80]!r}: {error}") from error
    if n_values > dimensions:
        embeddings /= np.sqrt(np.vecdot(embeddings, embeddings))[:, np.newaxis]
    bad = find_bad_vectors(embeddings)
    embeddings[bad] = np.nan
    return EmbeddingBatch(embeddings, _count_billed(response.usage), n_values, len(body), tuple(bad))


def _stack(values: Iterable[tuple[int, memoryview]], n_texts: int, dimensions: int) -> tuple[Float32Matrix, int]:
    """Vectors as rows, truncated to `dimensions`, NaN if there is none; and the values per vector as received."""
    embeddings, n_values = np.full((n_texts, 0), np.nan, dtype=np.float32), 0
    missing: list[int] = []
    kind = b""
    for index, value in values:
        vector = None
        if value != _NULL:
            begins = bytes(value[:1])
            kind = kind or begins
            if begins != kind or kind not in (b'"', b"["):
                found = sorted({kind, begins})
                raise MalformedResponseError(f"expected all vectors as base64 or all as arrays, got {found}")
            vector = _decode_base64(value) if kind == b'"' else _decode_array(value)
        if vector is None:
            missing.append(index)
            continue
        if not n_values:
            n_values = len(vector)
            embeddings = np.empty((n_texts, min(n_values, dimensions)), dtype=np.float32)
        if len(vector) != n_values or not n_values:
            raise MalformedResponseError(f"expected {n_values} values, got {len(vector)}")
        # also bad if a truncated value is not finite
        if n_values > dimensions and not np.isfinite(vector).all():
            missing.append(index)
        else:
            embeddings[index] = vector[:dimensions]
    embeddings[missing] = np.nan
    return embeddings, n_values


def find_bad_vectors(embeddings: Float32Matrix) -> list[int]:
    """Row numbers of the vectors that are zero or hold a value that is not finite."""
    # a sum of squares can over- or underflow although the vector is good
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.vecdot(embeddings, embeddings)
    suspects = np.flatnonzero(~(np.isfinite(squares) & (squares > 0)))
    return [int(row) for row in suspects if not (np.isfinite(embeddings[row]).all() and embeddings[row].any())]


def _fill_in(named: list[int | None], n_texts: int) -> list[int]:
    """The index of each item; -1 if it is missing and cannot be inferred.

    If all are missing, items are in the order of the texts. If one is missing, it is the one that no other item has.
    """
    n_missing = named.count(None)
    if n_missing == len(named) == n_texts:
        return list(range(n_texts))
    left = {*range(n_texts)} - {*named}
    missing = left.pop() if n_missing == len(left) == 1 else -1
    return [missing if index is None else index for index in named]


def _count_billed(usage: msgspec.Raw) -> int:
    """The tokens of `usage`, in any of the forms that servers use; 0 if it is not understood: the vectors count."""
    try:
        # not strict: some servers send numbers as text
        found = msgspec.json.decode(usage, type=_Usage | None, strict=False)
    except msgspec.ValidationError:
        return 0
    return max(0, found.prompt_tokens or found.total_tokens or 0) if found else 0


def _decode_base64(value: memoryview) -> NDArray[np.float32]:
    try:
        decoded = pybase64.b64decode(value[1:-1], validate=True)
    except binascii.Error:  # some serializers escape the slash
        decoded = pybase64.b64decode(msgspec.json.decode(value, type=str), validate=True)
    return np.frombuffer(decoded, dtype="<f4")


def _decode_array(value: memoryview) -> NDArray[np.float64] | None:
    content = bytes(value)
    # some servers write null for a vector, or a value, that is not a number (text-embeddings-inference #644)
    if _NULL in content and not _HAS_OTHERS.search(content):
        return None
    numbers = simdjson.Parser().parse(content)
    if not isinstance(numbers, simdjson.Array) or b"[" in content[1:]:
        raise MalformedResponseError(f"expected an array of numbers, got {content[:80]!r}")
    return np.frombuffer(numbers.as_buffer(of_type="d"), dtype=np.float64)


def _shorten(values: list[int]) -> str:
    return f"{values[:8]}{'…' if len(values) > 8 else ''} ({len(values)})"
