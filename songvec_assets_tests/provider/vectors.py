"""What the provider computes of a text: its tokens and its vector, both functions of the text alone.

Tests import this to know what must have arrived in the database. No HTTP, no faults, no state.
"""

import hashlib
import math
import struct

import numpy as np
from numpy.typing import NDArray

MIN_DIMENSIONS, MAX_DIMENSIONS = 8, 4096
MAX_CLUSTERS = 256
_N_STARTS = 2**20
_NOISE = np.random.default_rng(8).standard_normal(_N_STARTS + MAX_DIMENSIONS, dtype=np.float32)


def count_tokens(text: str) -> int:
    """Tokens of a text: a quarter of its characters, rounded up, at least one."""
    return max(1, math.ceil(len(text) / 4))


def digest_of(text: str) -> bytes:
    """16-byte BLAKE2b of the text: its name in the ledger and all that its vector depends on."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def vector_of(text: str, dimensions: int, n_clusters: int = 0) -> NDArray[np.float32]:
    """The unit vector of a text, float32 of shape (dimensions,).

    Matryoshka-like: a shorter vector is the start of a longer one, normalised again.
    """
    return vector_of_digest(digest_of(text), dimensions, n_clusters)


def vector_of_digest(digest: bytes, dimensions: int, n_clusters: int = 0) -> NDArray[np.float32]:
    """The unit vector of a text known by its digest.

    Two stretches of one fixed noise, mixed: their starts (20 bits each) and the weight (24 bits survive in
    float32) come from the digest. So a pair shares its vector with a probability of about 2⁻⁶⁴, and a start
    with 2⁻²⁰: among a million texts, most have a near neighbour, and all others are nearly orthogonal.

    With clusters (up to MAX_CLUSTERS) as much again comes from a third stretch, the centre of one of them.
    """
    first, second, weight = struct.unpack("<IIQ", digest)
    start, other = first % _N_STARTS, second % _N_STARTS
    mixed = _NOISE[other : other + dimensions] * np.float32(weight / 2**64)
    mixed += _NOISE[start : start + dimensions]
    if n_clusters:
        centre = (first >> 24) * n_clusters // MAX_CLUSTERS * MAX_DIMENSIONS  # 8 bits that no start uses
        mixed += _NOISE[centre : centre + dimensions]
    mixed *= 1.0 / math.sqrt(np.dot(mixed, mixed))
    return mixed
