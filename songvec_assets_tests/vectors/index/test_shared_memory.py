"""A server whose /dev/shm is as small as a container's: builds go on without workers, a failed VACUUM costs nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.progress import Progress
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.administration import dispose, execute
from songvec_assets_tests.servers import NotPermittedError, Server, running_server
from songvec_assets_tests.vectors.conftest import SPEC, TILING, assert_ledger_fits_table, put, upload
from songvec_assets_tests.vectors.indexes import build_index

# even a small table and a small index are for parallel workers
PARALLEL = {
    "min_parallel_table_scan_size": 0, "min_parallel_index_scan_size": 0, "max_parallel_maintenance_workers": 2,
    "max_parallel_workers_per_gather": 0,
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    try:
        with running_server(16 << 20, **PARALLEL) as server:
            yield server
    except NotPermittedError as error:
        pytest.skip(str(error))


def test_a_build_goes_on_without_workers_and_a_load_stays_done(server: Server, tmp_path: Path) -> None:
    database, cache = Database(server.url()), ModelCache(LocalStorage(tmp_path), SPEC.model, SPEC.dimensions)
    ensure_schema(database)
    put(cache, range(600))
    upload(database, cache, SPEC, TILING)
    execute(database.adbc_uri, "ALTER TABLE song_embeddings SET (parallel_workers = 1)")
    reported: list[Progress] = []
    server.fill_shared_memory(32 << 10)
    report = build_index(database, cache, SPEC, progress=reported.append)
    assert report.built
    assert "the server's /dev/shm is too small for parallel workers" in report.reason
    assert [each.note for each in reported if each.is_trouble] == [
        "the server's /dev/shm is too small for parallel workers, so it is built without them, which takes longer"
    ]
    valid = "SELECT bool_and(indisvalid), count(*) FROM pg_index WHERE indrelid = 'song_embeddings'::regclass"
    assert execute(database.adbc_uri, valid) == [(True, 2)]
    # the table has two indexes now, which VACUUM cleans side by side
    put(cache, range(600), version=1)
    reported.clear()
    loads = upload(database, cache, SPEC, TILING, progress=reported.append)
    assert sum(load.n_written for load in loads) == 600
    (warning,) = [each.note for each in reported if each.is_trouble]
    assert warning.startswith("the rows are loaded; VACUUM failed")
    assert "--shm-size" in warning
    assert "disk is full" not in warning
    assert_ledger_fits_table(database)
    dispose(database.url)
