"""The public names: those of the API, and those kept from the system this grew from, as the README has them."""

import importlib
import re
from pathlib import Path

import pytest

import songvec_assets
from songvec_assets import Pipeline

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

KEPT = {
    "get_engine": "songvec_assets.postgres.engine",
    "get_connection": "songvec_assets.postgres.engine",
    "read_songs_from_postgres": "songvec_assets.songs.readers",
    "cache_songs_to_parquet": "songvec_assets.songs.export",
    "load_songs_from_parquet": "songvec_assets.songs.snapshots",
    "get_max_cached_song_id": "songvec_assets.songs.snapshots",
    "EmbeddingClient": "songvec_assets.embedding.client",
    "RateLimiter": "songvec_assets.embedding.limits",
    "write_embeddings_to_file": "songvec_assets.cache.model_cache",
    "read_embeddings_from_file": "songvec_assets.cache.model_cache",
    "load_embeddings_from_cache": "songvec_assets.cache.model_cache",
    "upload_cached_embeddings_to_database": "songvec_assets.vectors.load",
    "store_embeddings_copy_bulk": "songvec_assets.vectors.load",
    "store_embeddings_batch": "songvec_assets.vectors.load",
}


@pytest.mark.parametrize(("name", "module"), KEPT.items())
def test_a_kept_name_is_where_the_readme_says(name: str, module: str) -> None:
    found = getattr(importlib.import_module(module), name)
    assert found.__module__ == module
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    row = next(line for line in rows if re.search(rf"`{name}[.`]", line))
    assert f"`{module}`" in row


def test_the_client_embeds_batches_under_its_kept_name() -> None:
    client = importlib.import_module("songvec_assets.embedding.client").EmbeddingClient
    assert callable(client.generate_embeddings_batch)


def test_each_method_of_the_readme_exists_and_each_step_is_in_it() -> None:
    named = {*re.findall(r"\bsongs\.(\w+)\(", README)}
    assert named <= {*dir(Pipeline)}
    steps = {"export", "embed", "load", "build_index", "run", "swap", "roll_back", "forget"}
    questions = {
        "status",
        "estimate",
        "dry_run",
        "verify",
        "search",
        "similar_to",
        "embed_query",
        "embeddings",
        "evaluate",
    }
    assert named == steps | questions
    assert all(getattr(Pipeline, name).__doc__ for name in named)
    assert {*re.findall(r"from songvec_assets import (\w+)", README)} <= {*songvec_assets.__all__}
