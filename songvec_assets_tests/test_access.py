"""From settings to what a search works with: opened when it is first used, and nothing before."""

import pytest
import sqlalchemy as sa

from songvec_assets.access import Access
from songvec_assets.embedding.client import EmbeddingClient
from songvec_assets.embedding.demo import DemoEmbedder
from songvec_assets.embedding.offline import OfflineEmbedder
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import OFFLINE_MODEL, Settings
from songvec_assets_tests.administration import execute

AWAY = "postgresql://ann:hunter2@127.0.0.1:1/music"


def access(**settings: object) -> Access:
    return Access(Settings(**{"postgres_url": AWAY, "fireworks_api_key": "fw_secret"} | settings))


def test_it_says_where_songs_come_from_and_vectors_are_made_and_no_secret(database: Database) -> None:
    assert "hunter2" not in repr(access())
    made = access(postgres_url=database.url)
    words = made.describe()
    assert words.startswith(f"{database.describe()}, fireworks/qwen3-embedding-8b at https://api.fireworks.ai/")
    assert words.endswith("2000 dimensions")
    assert "fw_secret" not in words + repr(made)
    demo = access(postgres_url=database.url, embedding_model="demo-v2", embedding_dimensions=512).describe()
    assert "DEMO vectors (demo-v2: a small model; FIREWORKS_API_KEY makes real ones)" in demo


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
    made = access(postgres_url=database.url, **settings)
    assert (type(made.embedder()), made.price.usd(10**6), made.server) == (kind, price, server)


def test_it_closes_what_it_opened_and_no_more(database: Database) -> None:
    with access() as unused:
        pass
    assert "database" not in vars(unused)
    with access(postgres_url=database.url) as used, used.database.get_connection("web") as connection:
        connection.execute(sa.text("SELECT 1"))
    statement = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'songvec'"
    assert execute(database.adbc_uri, statement) == []
