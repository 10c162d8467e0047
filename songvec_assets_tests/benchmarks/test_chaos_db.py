"""Short form of `make chaos-db`: each fault once, on a small table; no figures, only what must hold."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from benchmarks.chaos_db import FAULTS, find_usual_relations, prepared_server, run_fault
from songvec_assets_tests.servers import Server
from songvec_assets_tests.vectors.world import Report

pytestmark = pytest.mark.slow

N_SONGS, N_SONGS_WHERE_MORE = 200, 400
MORE = ("build", "names")
"""A build of fewer rows is over before it can be disturbed in each of its phases; the songs with names are 300."""

Prepared = tuple[Server, Path, set[str]]


@pytest.fixture(scope="module")
def prepared() -> Iterator[Prepared]:
    """A server that may be killed, a folder for caches, and the relations that an undisturbed run leaves."""
    with prepared_server() as (server, folder):
        yield server, folder, find_usual_relations(server, folder, N_SONGS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_clearly_and_a_rerun_makes_it_right(prepared: Prepared, fault: str) -> None:
    server, folder, usual = prepared
    report = Report(usual=usual, thorough=False)
    n_songs = N_SONGS_WHERE_MORE if any(word in fault for word in MORE) else N_SONGS
    run_fault(fault, server, folder, report, Random(fault), n_songs)
    if fault in report.not_run:
        pytest.skip(report.not_run[fault])
    assert report.passed, report.render()
