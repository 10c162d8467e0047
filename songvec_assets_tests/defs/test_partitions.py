"""The partitions: one per range, shaped by settings that are read when the graph loads."""

import os
import subprocess
import sys

import dagster as dg
import pytest

from songvec_assets.definitions import defs
from songvec_assets.defs.partitions import TILING


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


@pytest.mark.slow
@pytest.mark.parametrize("value", ["0", "many", "70000"])
def test_a_bad_graph_setting_is_refused_by_name(value: str) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import songvec_assets.definitions"],
        cwd="/", env=os.environ | {"SONGVEC_RANGE_SIZE": value}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert loaded.returncode != 0
    assert "SONGVEC_RANGE_SIZE" in loaded.stderr.splitlines()[-1]
