"""The offline embedder: unit vectors that depend on the text and on nothing else."""

import asyncio
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.embedding.offline import OfflineEmbedder

PROFILE = settings(deadline=None)
TEXTS = ["The sea by Ann\nwaves and salt", "海を歩く", "ночь нежна", "…", "", "la la la", "ทะเล", "E\u0301tude"]


def embed(texts, dimensions=64):
    return asyncio.run(OfflineEmbedder(dimensions).generate_embeddings_batch(texts)).embeddings


def similarity(one, other, dimensions=512):
    first, second = embed([one, other], dimensions)
    return float(first @ second)


@PROFILE
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4), st.sampled_from([2, 3, 64, 2000]))
def test_every_text_gets_a_finite_vector_of_unit_length(texts, dimensions):
    embeddings = embed(texts, dimensions)
    assert embeddings.shape == (len(texts), dimensions)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


@PROFILE
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_a_vector_does_not_depend_on_the_texts_beside_it(texts):
    together = embed(texts)
    for text, embedding in zip(texts, together, strict=True):
        assert embed([text])[0].tobytes() == embedding.tobytes()


def test_another_process_makes_the_same_vectors():
    """Python's own hash differs a process; a cache filled by one run is searched by another."""
    program = (
        "import asyncio, hashlib, sys; from songvec_assets.embedding.offline import OfflineEmbedder; "
        "batch = asyncio.run(OfflineEmbedder(64).generate_embeddings_batch(sys.argv[1:])); "
        "print(hashlib.sha256(batch.embeddings.tobytes()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, *TEXTS],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {hashlib.sha256(embed(TEXTS).tobytes()).hexdigest()}


def test_nothing_is_billed():
    assert asyncio.run(OfflineEmbedder(8).generate_embeddings_batch(TEXTS)).n_tokens == 0


def test_closing_is_harmless():
    asyncio.run(OfflineEmbedder(8).close())


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("sailing on the sea", "a sailor at sea", "two toothbrushes in a cup"),
        ("the dogs are barking", "one dog barks", "bread from the baker"),
        ("海辺を歩く", "歩く海辺", "夜明けパン屋"),
        ("море ночью", "ночью у моря", "хлеб, соль"),
    ],
)
def test_shared_words_bring_texts_nearer(text, near, far):
    assert similarity(text, near) > similarity(text, far) + 0.1


def test_case_accents_and_compatibility_forms_do_not_matter():
    assert similarity("CAFÉ Étude", "cafe etude") == pytest.approx(1, abs=1e-5)
    assert similarity("ｓｅａ", "sea") == pytest.approx(1, abs=1e-5)


def test_different_texts_have_different_vectors():
    assert len({embedding.tobytes() for embedding in embed(TEXTS)}) == len(TEXTS)
