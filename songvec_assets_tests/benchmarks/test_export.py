"""A short form of `make bench-export`: no figures, only what must hold. Peers that need more packages are left out."""

from pathlib import Path

import polars as pl
import pytest

from benchmarks.export import Measure, create_catalogue, run_again, run_way, spread_ids
from benchmarks.export_ways import Job
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import execute

pytestmark = pytest.mark.slow

N_SONGS = 2_000


def run_here(way: str, job: Job) -> Measure:
    """Measured in this process: what it takes is of no interest."""
    seconds, cpu_s, peak_mb = run_way(way, job)
    return Measure(seconds, cpu_s, 0.0, peak_mb)


@pytest.fixture
def job(database: Database, tmp_path: Path) -> Job:
    """A small catalogue to export."""
    create_catalogue(database.url, N_SONGS)
    return Job(database.url, "songs", N_SONGS, tmp_path)


def test_all_ways_write_the_songs_of_the_table(job: Job) -> None:
    expected = execute(job.url, "SELECT id, name, artist, lyrics FROM songs ORDER BY id")
    for place, way in enumerate(("this", "polars, SQLAlchemy stream", "psycopg2, server-side cursor", "3 readers")):
        folder = job.folder / str(place)
        folder.mkdir()
        run_way(way, job._replace(folder=folder))
        songs = pl.concat([pl.read_parquet(path).select(pl.nth(0, 1, 2, 3)) for path in sorted(folder.iterdir())])
        assert songs.sort(songs.columns[0]).rows() == expected
    run_way("COPY, dropped, 2 connections", job)


def test_a_rerun_writes_the_ranges_concerned(job: Job) -> None:
    run_way("this", job)
    assert [(each.concerned, each.written) for each in run_again(job, run_here)] == [(0, 0), (1, 1), (20, 20)]


def test_spread_ids_make_as_many_ranges(job: Job) -> None:
    spread_ids(job.url, job.width)
    assert execute(job.url, "SELECT count(*), min(id), max(id) FROM sparse_songs") == [(N_SONGS, 0, 2_100_000_099)]
    run_way("this", job._replace(table="sparse_songs"))
    assert len(list(job.folder.iterdir())) == 20
