"""What the ledger says of the loaded ranges."""

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.table import VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.vectors.conftest import load, put


class TestModels:
    def test_the_ledgers_models_come_with_their_songs(self, database: Database, cache: ModelCache) -> None:
        assert VectorTable(database).ledger.read_models() == {}
        put(cache, range(150))
        load(database, cache)
        assert VectorTable(database).ledger.read_models() == {("model-a", 8): 150}
        execute(database.adbc_uri, "UPDATE songvec.loaded_ranges SET model = 'model-b' WHERE range_start = 100")
        assert VectorTable(database).ledger.read_models() == {("model-a", 8): 100, ("model-b", 8): 50}
