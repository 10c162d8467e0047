"""From settings to what a run works with: opened when it is first used, and nothing before."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets.embedding.client import EmbeddingClient
from songvec_assets.embedding.demo import DemoEmbedder
from songvec_assets.embedding.offline import OfflineEmbedder
from songvec_assets.embedding.pricing import UTF8_BYTES_PER_TOKEN
from songvec_assets.errors import SettingsError, SourceError, StoppedError, StoreError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import OFFLINE_MODEL, Settings
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage
from songvec_assets.wiring import Wiring
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider

AWAY = "postgresql://ann:hunter2@127.0.0.1:1/music"


def wiring(**settings: object) -> Wiring:
    return Wiring(Settings(**{"postgres_url": AWAY, "fireworks_api_key": "fw_secret"} | settings))


def test_it_says_where_songs_come_from_and_vectors_are_made_and_no_secret(database: Database) -> None:
    assert "hunter2" not in repr(wiring())
    made = wiring(postgres_url=database.url)
    words = made.describe()
    assert words.startswith(f"{database.describe()}, fireworks/qwen3-embedding-8b at https://api.fireworks.ai/")
    assert words.endswith("2000 dimensions")
    assert "fw_secret" not in words + repr(made)
    demo = wiring(postgres_url=database.url, embedding_model="demo-v2", embedding_dimensions=512).describe()
    assert "DEMO vectors (demo-v2: a small model; FIREWORKS_API_KEY makes real ones)" in demo


@pytest.mark.parametrize(
    ("settings", "folder"),
    [({}, ".songvec/main"), ({"postgres_url": None}, ".songvec/demo"), ({"storage": "/data/songs"}, "/data/songs")],
)
def test_the_store_is_in_the_folder_that_is_set_else_in_that_of_the_database(
    settings: dict[str, object], folder: str
) -> None:
    assert wiring(**settings).storage == LocalStorage(Path(folder))


@pytest.mark.parametrize(
    ("settings", "kind", "price", "server"),
    [
        ({"usd_per_million_tokens": 2.0}, EmbeddingClient, 2.0, "https://api.fireworks.ai/inference/v1"),
        ({"embedding_model": OFFLINE_MODEL, "embedding_dimensions": 64}, OfflineEmbedder, 0.0, OFFLINE_MODEL),
        ({"embedding_model": "demo-v2", "embedding_dimensions": 512}, DemoEmbedder, 0.0, "demo-v2"),
    ],
)
def test_the_model_decides_who_makes_vectors_and_what_they_cost(
    database: Database, settings: dict[str, object], kind: type, price: float, server: str
) -> None:
    made = wiring(postgres_url=database.url, **settings)
    assert (type(made.embedder()), made.price.usd(10**6), made.server) == (kind, price, server)


def test_both_sides_know_each_other_from_the_first_write_on(
    songs: Callable[..., None], pipeline: Pipeline, database: Database, provider: Provider, tmp_path: Path
) -> None:
    songs((1, "Sea", "Ann", "waves"))
    assert not pipeline.storage.root.exists(), "it was only made"
    pipeline.bind()
    assert make_pipeline(database, provider, pipeline.storage.root).store.store_id == pipeline.store.store_id
    with pytest.raises(StoreError, match="belongs to another database"):
        make_pipeline(database, provider, tmp_path / "another").bind()


def test_a_database_without_songs_and_songs_that_no_range_reaches_bind_nothing(
    database: Database, pipeline: Pipeline, songs: Callable[..., None]
) -> None:
    with pytest.raises(SourceError, match="no table songs"):
        pipeline.bind()
    execute(database.adbc_uri, "CREATE TABLE songs (id bigint PRIMARY KEY, name text, artist text, lyrics text)")
    execute(database.adbc_uri, "INSERT INTO songs VALUES (5000000000, 'Sea', 'Ann', 'la')")
    with pytest.raises((SettingsError, SourceError)):
        Pipeline(pipeline.settings).bind()
    assert not pipeline.storage.root.exists()


def test_a_range_is_filled_by_one_run_at_a_time(pipeline: Pipeline) -> None:
    other, waited = Pipeline(pipeline.settings), []
    song_range = SongIdRange(0, 100)

    def wait() -> None:
        waited.append(1)
        other.cancel()

    with pipeline.lock_range(song_range, lambda: None, lambda: None) as check_held:
        check_held()
        with pytest.raises(StoppedError), other.lock_range(song_range, wait, other.stop.check):
            pass
    assert waited == [1]


def test_the_estimator_begins_with_what_was_learned_of_the_model(pipeline: Pipeline) -> None:
    assert pipeline.token_estimator().bytes_per_token == UTF8_BYTES_PER_TOKEN
    with pipeline.database.get_connection() as connection:
        connection.execute(
            sa.text("INSERT INTO songvec.settings (key, value) VALUES (:key, '2.5')"),
            {"key": f"bytes per token of {pipeline.settings.model}"},
        )
    assert pipeline.token_estimator().bytes_per_token == 2.5


def test_it_closes_what_it_opened_and_no_more(database: Database) -> None:
    with wiring() as unused:
        pass
    assert "database" not in vars(unused)
    with wiring(postgres_url=database.url) as used, used.database.get_connection("web") as connection:
        connection.execute(sa.text("SELECT 1"))
    statement = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'songvec'"
    assert execute(database.adbc_uri, statement) == []
