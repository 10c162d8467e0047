"""The graph as it is declared."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.definitions import defs
from songvec_assets.defs.partitions import TILING
from songvec_assets.defs.resources import (
    RESOURCES,
    FireworksResource,
    PostgresResource,
    RunResource,
    StorageResource,
    given,
)
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import (
    GraphSettings,
    PostgresSettings,
    ProviderSettings,
    RunSettings,
    Settings,
    StorageSettings,
    variables,
)
from songvec_assets.storage import Storage
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.swap import WantedTable, bring_table_up_to_date
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.vectors.conftest import SPEC, put
from songvec_assets_tests.vectors.conftest import TILING as SMALL_TILING

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_graph_is_a_line_of_four_assets() -> None:
    graph = defs.resolve_asset_graph()
    parents = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert parents == {
        "songs": set(),
        "songs_parquet": {"songs"},
        "embedding_cache": {"songs_parquet"},
        "song_embeddings_table": {"embedding_cache"},
        "ivfflat_index": {"song_embeddings_table"},
    }


def test_only_the_cache_is_partitioned_and_one_run_takes_any_number_of_ranges() -> None:
    graph = defs.resolve_asset_graph()
    partitioned = {key.to_user_string() for key in graph.get_all_asset_keys() if graph.get(key).is_partitioned}
    assert partitioned == {"embedding_cache"}
    policies = {graph.get(key).backfill_policy for key in graph.executable_asset_keys}
    assert policies == {dg.BackfillPolicy.single_run()}
    keys = graph.get(dg.AssetKey("embedding_cache")).partitions_def.get_partition_keys()
    assert (keys[0], keys[-2], keys[-1], len(keys)) == (
        "000000000-000050000", "015950000-016000000", "016000000-max", len(TILING),
    )  # fmt: skip


def test_wrong_vectors_and_mixed_models_block_what_is_downstream() -> None:
    checks = {
        spec.key.to_user_string(): spec.blocking
        for check in defs.asset_checks or []
        for spec in check.check_specs  # type: ignore[union-attr]
    }
    assert checks == {
        "song_embeddings_table:coverage": False,
        "song_embeddings_table:few_rejected": False,
        "song_embeddings_table:texts_are_lyrics": False,
        "song_embeddings_table:no_orphans": False,
        "song_embeddings_table:vectors_are_sound": True,
        "song_embeddings_table:one_model": True,
        "song_embeddings_table:billed_as_estimated": False,
        "song_embeddings_table:price_is_sane": False,
        "ivfflat_index:index_is_used": False,
        "ivfflat_index:index_is_fresh": False,
        "ivfflat_index:recall_reaches_target": False,
    }


def test_every_setting_is_an_option_of_one_resource_shapes_the_graph_or_is_secret() -> None:
    secret = {name for name, field in Settings.model_fields.items() if not field.repr}
    assert secret == {"postgres_url", "direct_url", "fireworks_api_key", "webhook_url"}
    options = {
        PostgresResource: given(PostgresSettings, PostgresResource()),
        FireworksResource: given(ProviderSettings, FireworksResource()),
        StorageResource: given(StorageSettings, StorageResource()),
        RunResource: given(RunSettings, RESOURCES["run"]),
    }
    assert {value for values in options.values() for value in values.values()} == {None}
    names = [name for values in options.values() for name in values]
    assert sorted([*names, *secret, *GraphSettings.model_fields]) == sorted(Settings.model_fields)
    for resource in options:
        assert not {*resource.model_fields} & secret


def test_the_code_location_loads_with_an_empty_environment_and_without_warnings() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in variables()}
    loaded = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import songvec_assets.definitions"],
        cwd="/", env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (loaded.returncode, loaded.stderr) == (0, "")


@pytest.mark.parametrize("value", ["0", "many", "70000"])
def test_a_bad_graph_setting_is_refused_by_name(value: str) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import songvec_assets.definitions"],
        cwd="/", env=os.environ | {"SONGVEC_RANGE_SIZE": value}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert loaded.returncode != 0
    assert "SONGVEC_RANGE_SIZE" in loaded.stderr.splitlines()[-1]


def test_the_rollback_job_lets_the_table_before_serve_again(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = ModelCache(Storage(tmp_path / "embeddings"), SPEC.model, SPEC.dimensions)
    put(cache, range(30))
    for spec in (SPEC, TableSpec(SPEC.model, SPEC.dimensions, "halfvec")):
        bring_table_up_to_date(database, LoadSource(cache, SMALL_TILING), WantedTable(spec, may_swap=True))
    monkeypatch.setenv("POSTGRES_URL", database.url)
    monkeypatch.setenv("FIREWORKS_API_KEY", "never-used")
    with dg.DagsterInstance.ephemeral() as instance:
        job = defs.resolve_job_def("rollback")
        assert job.execute_in_process(instance=instance).success
        assert VectorTable(database).spec == SPEC
        failed = job.execute_in_process(instance=instance, raise_on_error=False)
    (failure,) = [event for event in failed.all_events if event.is_step_failure]
    assert "there is no table song_embeddings_old" in str(failure.step_failure_data.user_failure_data)
