"""Response bytes of an OpenAI-compatible embeddings endpoint to a float32 matrix. Pure.

Protocol as documented by OpenAI and Fireworks (read 2026-11): `data` is a list of {index, embedding}; an embedding
is base64 of little-endian float32, or a JSON array of numbers where the server knows no base64.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
import pybase64
from numpy.typing import NDArray

from songvec_assets.errors import ProviderUnavailableError

Float32Matrix = NDArray[np.float32]


class MalformedResponseError(ProviderUnavailableError):
    """A 200 whose body is not one good vector for each text. The request is tried again, nothing is stored."""


@dataclass(frozen=True)
class EmbeddingBatch:
    """The vectors of one request.

    Attributes:
        embeddings: float32, (n texts, dimensions), in the order of the texts.
        n_tokens: prompt tokens the provider says it billed; 0 where it does not say.
    """

    embeddings: Float32Matrix
    n_tokens: int


class _Item(msgspec.Struct):
    index: int
    embedding: msgspec.Raw


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = 0


class _Response(msgspec.Struct):
    data: list[_Item]
    usage: _Usage | None = None


_decode_response = msgspec.json.Decoder(_Response).decode
_decode_floats = msgspec.json.Decoder(list[float]).decode


def decode_response(body: bytes, n_texts: int) -> EmbeddingBatch:
    """Decode and check one response.

    Args:
        body: the response's JSON.
        n_texts: texts that were sent.

    Raises:
        MalformedResponseError: not JSON of that shape, an index missing or twice, vectors of unequal size, not finite,
            or zero.
    """
    try:
        response = _decode_response(body)
        order = [item.index for item in response.data]
        if not order or sorted(order) != list(range(n_texts)):
            raise MalformedResponseError(f"expected each index from 0 to {n_texts - 1} once, got {_shorten(order)}")
        # each vector goes straight into its row: a second copy of them all would double what a request holds
        embeddings = np.empty((n_texts, len(_decode_vector(response.data[0].embedding))), dtype=np.float32)
        for item in response.data:
            vector = _decode_vector(item.embedding)
            if len(vector) != embeddings.shape[1]:
                raise MalformedResponseError(f"expected {embeddings.shape[1]} values, got {len(vector)}")
            embeddings[item.index] = vector
    except (msgspec.DecodeError, ValueError) as error:
        raise MalformedResponseError(f"expected an embeddings response, got {body[:80]!r}: {error}") from error
    if bad := find_bad_vectors(embeddings):
        raise MalformedResponseError(f"expected finite vectors other than zero, got bad ones at {_shorten(bad)}")
    n_tokens = response.usage.prompt_tokens if response.usage else 0
    return EmbeddingBatch(embeddings, n_tokens or 0)


def find_bad_vectors(embeddings: Float32Matrix) -> list[int]:
    """Row numbers of the vectors that are zero or hold a value that is not finite."""
    squares = np.einsum("ij,ij->i", embeddings, embeddings)
    suspects = np.flatnonzero(~(np.isfinite(squares) & (squares > 0)))
    # a sum of squares can over- or underflow where the vector itself is good
    return [int(row) for row in suspects if not (np.isfinite(embeddings[row]).all() and embeddings[row].any())]


def truncate_vectors(embeddings: Float32Matrix, dimensions: int) -> Float32Matrix:
    """The first `dimensions` values of each vector, at unit length: a Matryoshka-trained model's smaller size."""
    cut = embeddings[:, :dimensions]
    norms: Float32Matrix = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.ascontiguousarray(cut / norms, dtype=np.float32)


def _decode_vector(raw: msgspec.Raw) -> NDArray[np.float32]:
    value = bytes(raw)
    if not value.startswith(b'"'):
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            return np.array(_decode_floats(value), dtype=np.float32)
    # some serialisers escape the slash
    encoded = msgspec.json.decode(value, type=str).encode() if b"\\" in value else value[1:-1]
    return np.frombuffer(pybase64.b64decode(encoded, validate=True), dtype="<f4")


def _shorten(values: list[int]) -> str:
    return f"{values[:8]}{'…' if len(values) > 8 else ''} ({len(values)})"
