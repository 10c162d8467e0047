"""How long a fill looks for texts in the other ranges of a cache of 12 million songs, and how much memory that takes.

`python -m benchmarks.other_ranges [--ranges 240]`: vectors are short, since looking reads none.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from songvec_assets.cache.elsewhere import OtherRanges
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cache.parts import PIECE_ROWS, CachedRows
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage

_WIDTH, _DIMENSIONS, _HASH_BYTES = 50_000, 16, 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranges", type=int, default=240)
    n_ranges = parser.parse_args().ranges
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        cache = ModelCache(LocalStorage(Path(folder)), "m", _DIMENSIONS)
        for number in range(n_ranges):
            _fill(cache, number, random)
        lacking = SongIdRange(n_ranges * _WIDTH, (n_ranges + 1) * _WIDTH)
        hashes = np.frombuffer(random.bytes(_HASH_BYTES * _WIDTH), dtype=f"V{_HASH_BYTES}").tolist()
        schema = {"song_id": pl.Int32, "text_hash": pl.Binary}
        songs = pl.DataFrame({"song_id": range(lacking.start, lacking.stop), "text_hash": hashes}, schema)
        others, before = OtherRanges(cache), _anonymous_mb()
        for what in ("first", "next"):
            _measure(f"{n_ranges} ranges, the {what} range that lacks them", lambda: others.find(lacking, songs))
        print(f"memory: {_anonymous_mb() - before:,.0f} MB")
        stored = cache.open(SongIdRange(0, _WIDTH)).all_rows["text_hash"]
        moved = songs.with_columns(text_hash=stored)
        _measure("copying a range", lambda: others.copy(cache.open(lacking), moved, lambda: None))


def _fill(cache: ModelCache, number: int, random: np.random.Generator) -> None:
    """A range of parts, as answers leave it."""
    cached = cache.open(SongIdRange(number * _WIDTH, (number + 1) * _WIDTH))
    for start in range(0, _WIDTH, PIECE_ROWS):
        n_rows = min(PIECE_ROWS, _WIDTH - start)
        song_ids = np.arange(cached.range.start + start, cached.range.start + start + n_rows)
        hashes = np.frombuffer(random.bytes(_HASH_BYTES * n_rows), dtype=f"V{_HASH_BYTES}")
        embeddings = random.normal(size=(n_rows, _DIMENSIONS)).astype(np.float32)
        cached.open_writer().write([CachedRows.of(song_ids.tolist(), hashes, embeddings)])
    cached.add_written()
    cached.save(cached.manifest)


def _measure(what: str, work: Callable[[], pl.DataFrame]) -> None:
    started, started_cpu = time.perf_counter(), time.process_time()
    n_songs = work().height
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    print(f"{what}: {n_songs:,} songs found, {seconds:.2f} s, {cpu:.2f} s of CPU")


def _anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
