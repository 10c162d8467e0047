"""Songs per second from a table in Postgres to zstd-1 Parquet files, compared with other ways to do the same.

    python -m benchmarks.export                             a million songs of about 1.2 KB, twice each way
    python -m benchmarks.export --songs 20000 --rounds 1    a short form

Each way runs in its own process, as its documentation shows it, and is timed from after the imports. `COPY` reads the
same bytes and discards them: the limit of a connection. All share the machine with the server; only this export calls
fsync. Then exports again, after nothing, a part or scattered songs changed, and of the same songs with
ids from 0 to 2.1 billion. Exit code 1 if a goal is missed.
"""

import argparse
import contextlib
import getpass
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import psycopg2

from benchmarks.export_ways import COLUMNS, N_RANGES, READERS, WAYS, Job

MAX_PEAK_MB = 450


class Measure(NamedTuple):
    """What an export took; CPU seconds of this process and of the server's."""

    seconds: float
    cpu_s: float
    server_cpu_s: float
    peak_mb: float


def run_way(name: str, job: Job) -> tuple[float, float, float]:
    """Export in this process; seconds, CPU seconds and peak memory in MB.

    Raises:
        RuntimeError: the files do not hold all songs.
    """
    way = (WAYS | READERS)[name]
    for module in way.modules.split():
        importlib.import_module(module)
    started, cpu_s = time.perf_counter(), time.process_time()
    way.export(job)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
    # getrusage's peak would include what the parent held before exec
    peak_kib = int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    if way.writes:
        import pyarrow.parquet as pq

        n_rows = sum(pq.read_metadata(path).num_rows for path in job.folder.glob("*.parquet"))
        if n_rows != job.n_songs:
            raise RuntimeError(f"{name} wrote {n_rows:,} songs of {job.n_songs:,}")
    return seconds, cpu_s, peak_kib * 1024 / 1e6


def measure(name: str, job: Job) -> Measure:
    """Export in its own process."""
    before = server_cpu_s(job.url)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        seconds, cpu_s, peak_mb = processes.submit(run_way, name, job).result()
    return Measure(seconds, cpu_s, server_cpu_s(job.url) - before, peak_mb)


def server_cpu_s(url: str) -> float:
    """CPU seconds of all the server's processes so far, those that ended included."""
    with contextlib.closing(psycopg2.connect(url)) as connection:
        server = psutil.Process(connection.info.backend_pid).parent()
    assert server is not None
    while True:
        ended = server.cpu_times()
        # one that ends meanwhile is counted with those that ended when they are asked again
        with contextlib.suppress(psutil.NoSuchProcess):
            running = sum(sum(each.cpu_times()[:2]) for each in server.children())
            if server.cpu_times()[2:4] == ended[2:4]:
                return ended.children_user + ended.children_system + running


def create_catalogue(url: str, n_songs: int) -> None:
    """Table `songs`: lines of the sample songs in a new order, about 1.2 KB per song, ids from 0 on."""
    import adbc_driver_postgresql.dbapi as adbc
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from songvec_assets.samples import read_sample_songs
    from songvec_assets_tests.administration import execute

    samples, draw = read_sample_songs(), np.random.default_rng(1)
    lines = pa.array([line for lyrics in samples["lyrics"].drop_nulls() for line in lyrics.splitlines()])
    names, artists = pa.array(samples["name"].to_list()), pa.array(samples["artist"].to_list())

    def choose(among: Any, n_chosen: int) -> Any:
        return among.take(pa.array(draw.integers(len(among), size=n_chosen)))

    def make(song_ids: Any) -> Any:
        n = len(song_ids)
        titles = pc.binary_join_element_wise(choose(names, n), song_ids.cast(pa.string()), " no. ")
        lyrics = pc.binary_join_element_wise(*(choose(lines, n) for _ in range(29)), "\n")
        return pa.record_batch([song_ids, titles, choose(artists, n), lyrics], names=COLUMNS.split(", "))

    execute(url, "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
    with adbc.connect(url) as connection, connection.cursor() as cursor:
        for start in range(0, n_songs, 10_000):
            cursor.adbc_ingest(
                "songs", make(pa.array(range(start, min(start + 10_000, n_songs)), pa.int32())), "append"
            )
        connection.commit()
    execute(url, "VACUUM ANALYZE songs")


def spread_ids(url: str, width: int) -> None:
    """Table `sparse_songs`: the same songs, one range per 50 million ids, the last one in the open tail."""
    from songvec_assets_tests.administration import execute

    spread = f"id % {width} + CASE WHEN id / {width} < {N_RANGES - 1} THEN id / {width} * 50000000 ELSE 2100000000 END"
    execute(
        url,
        f"CREATE TABLE sparse_songs AS SELECT {spread} AS id, name, artist, lyrics FROM songs; "
        "ALTER TABLE sparse_songs ADD PRIMARY KEY (id)",
    )
    execute(url, "VACUUM ANALYZE sparse_songs")


class Rerun(NamedTuple):
    """An export after an earlier one."""

    name: str
    concerned: int
    written: int
    measured: Measure


def run_again(job: Job, measured: Callable[[str, Job], Measure] = measure) -> Iterator[Rerun]:
    """Export again after nothing changed, after 1 % of the songs in one part did, and after 1 % all over did."""
    from songvec_assets_tests.administration import execute

    part = job.n_songs // 100
    changes = {
        "nothing changed": "false",
        "1 % changed in one part": f"id >= {job.n_songs // 2} AND id < {job.n_songs // 2 + part}",
        "1 % changed all over": "id % 100 = 7",
    }
    for name, where in changes.items():
        execute(job.url, f"UPDATE {job.table} SET lyrics = lyrics || ' la' WHERE {where}")
        concerned = execute(job.url, f"SELECT count(DISTINCT id / {job.width}) FROM {job.table} WHERE {where}")[0][0]
        before = {path: path.stat().st_mtime_ns for path in job.folder.iterdir()}
        result = measured("this", job)
        written = sum(path.stat().st_mtime_ns != before[path] for path in job.folder.iterdir())
        yield Rerun(name, concerned, written, result)


def render_ways(measures: dict[str, list[Measure]], n_songs: int) -> str:
    """Medians and spread, and how many times as fast this package is, round by round."""
    rows = [
        "| way | songs/s | min–max | speed-up of this package | client CPU s | server CPU s | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in measures.items():
        rates = [n_songs / run.seconds for run in runs]
        pairs = zip(runs, next(iter(measures.values())), strict=True)
        rows.append(
            f"| {name} | {median(rates):,.0f} | {min(rates):,.0f}–{max(rates):,.0f} "
            f"| {median(run.seconds / first.seconds for run, first in pairs):.1f} "
            f"| {median(run.cpu_s for run in runs):.1f} | {median(run.server_cpu_s for run in runs):.1f} "
            f"| {max(run.peak_mb for run in runs):,.0f} |"
        )
    return "\n".join(rows)


def render_reruns(reruns: list[Rerun]) -> str:
    """A row per rerun."""
    rows = [
        "| export again | seconds | ranges concerned | ranges written | peak MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, concerned, written, measured in reruns:
        rows.append(f"| {name} | {measured.seconds:.1f} | {concerned} | {written} | {measured.peak_mb:,.0f} |")
    return "\n".join(rows)


def find_misses(measures: dict[str, list[Measure]], reruns: list[Rerun], sparse_s: float) -> list[str]:
    """The goals that were missed."""
    seconds = {name: median(run.seconds for run in runs) for name, runs in measures.items()}
    peak_mb = max(run.peak_mb for run in [*measures["this"], *(rerun.measured for rerun in reruns)])
    slower = [name for name in seconds if WAYS[name].writes and seconds[name] < seconds["this"]]
    return [
        *(f"{name} is faster" for name in slower),
        *([f"peak memory is {peak_mb:,.0f} MB, more than {MAX_PEAK_MB}"] if peak_mb > MAX_PEAK_MB else []),
        *(f"{each.name}: {each.written} ranges written" for each in reruns if each.written != each.concerned),
        *([f"sparse ids take {sparse_s:.1f} s"] if sparse_s > 1.2 * seconds["this"] else []),
    ]


def main() -> None:
    """Measure all and print tables; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export")
    parser.add_argument("--songs", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    asked = parser.parse_args()
    from songvec_assets.postgres.embedded import start_embedded_server

    # a short path: the server's socket lies in its folder, and socket paths end at 107 characters
    with tempfile.TemporaryDirectory(prefix=f"songvec-{getpass.getuser()}-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        url = start_embedded_server(folder / "pg").url
        create_catalogue(url, asked.songs)

        def measure_way(way: str, table: str = "songs") -> Measure:
            with tempfile.TemporaryDirectory(dir=folder) as files:
                return measure(way, Job(url, table, asked.songs, Path(files)))

        rounds = [{way: measure_way(way) for way in dict.fromkeys(["this", *asked.ways])} for _ in range(asked.rounds)]
        measures = {way: [each[way] for each in rounds] for way in rounds[0]}
        print(render_ways(measures, asked.songs), end="\n\n", flush=True)
        rounds = [{way: measure_way(way) for way in READERS} for _ in range(asked.rounds)]
        print(
            render_ways({way: [each[way] for each in rounds] for way in READERS}, asked.songs), end="\n\n", flush=True
        )
        kept = Job(url, "songs", asked.songs, folder / "songs")
        kept.folder.mkdir()
        measure("this", kept)
        reruns = list(run_again(kept))
        print(render_reruns(reruns), end="\n\n", flush=True)
        spread_ids(url, kept.width)
        sparse_s = min(measure_way("this", "sparse_songs").seconds for _ in range(asked.rounds))
    print(f"The same songs with ids from 0 to 2.1 billion: {sparse_s:.1f} s")
    misses = find_misses(measures, reruns, sparse_s)
    print("\n".join(f"Missed: {each}" for each in misses))
    sys.exit(1 if misses else 0)


if __name__ == "__main__":
    main()
