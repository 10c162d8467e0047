"""What fills and dry runs do to the store besides storing answers, counted in calls and compared byte for byte."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from songvec_assets.cache import completion, model_cache
from songvec_assets.cache import fill as fill_module
from songvec_assets.cache.manifest import Completion
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cache.parts import CachedRows
from songvec_assets.cache.plan import FillPlan, FillReport
from songvec_assets.cli import app
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.conftest import environment_of, make_pipeline
from songvec_assets_tests.provider import Provider

pytestmark = pytest.mark.slow

FIRST, SECOND = SongIdRange(0, 100), SongIdRange(100, 200)
CALLS = ("read", "open", "scan", "write", "put_if_unchanged", "delete", "delete_all")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """All calls of the storage since: the method, and the full name of the key."""
    counted: list[tuple[str, str]] = []

    def counting(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: LocalStorage, key: str = "", *given: Any) -> Any:
            counted.append((name, str(self.root / key)))
            return do(self, key, *given)

        return call

    for name in CALLS:
        monkeypatch.setattr(LocalStorage, name, counting(name, getattr(LocalStorage, name)))
    return counted


def fill(pipeline: Pipeline) -> list[FillReport]:
    """Fill all ranges."""
    reports: list[FillReport] = []
    pipeline.filler().fill_ranges(list(pipeline.tiling), reports.append)
    assert [report.error for report in reports] == [None] * len(reports)
    return reports


def bytes_under(root: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of change of all files."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_fill_with_nothing_to_do_reads_and_lists_each_range_once_and_opens_no_file(
    songs: Callable[..., None],
    database: Database,
    provider: Provider,
    tmp_path: Path,
    calls: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", "stones"), (150, "Moon", "Cy", "a silver light"))
    pipeline = make_pipeline(database, provider, tmp_path / "store")
    pipeline.export()
    fill(pipeline)
    again = make_pipeline(database, provider, tmp_path / "store")
    filler, reports = again.filler(), []
    folder = again.cache.storage.root
    before, n_requests = bytes_under(tmp_path), provider.ledger()["requests"]
    calls.clear()
    monkeypatch.setattr(Pipeline, "lock_range", None)
    filler.fill_ranges(list(again.tiling), reports.append)
    assert [(report.range, report.n_unchanged, report.n_embedded) for report in reports] == [
        (FIRST, 2, 0),
        (SECOND, 1, 0),
    ]
    in_ranges = Counter(call for call in calls if call[1].startswith(f"{folder}/0"))
    assert in_ranges == {
        call: 1
        for each in (FIRST, SECOND)
        for call in [("read", f"{folder}/{each.key}/manifest.json"), ("scan", f"{folder}/{each.key}")]
    }
    elsewhere = Counter(call for call in calls if call[0] not in ("read", "scan"))
    footers = [("open", f"{again.store.songs.storage.root}/{each.key}.parquet") for each in (FIRST, SECOND)]
    assert elsewhere == dict.fromkeys(footers, 1)
    assert (bytes_under(tmp_path), provider.ledger()["requests"]) == (before, n_requests)


def test_a_fill_reads_how_texts_are_made_and_its_snapshot_a_few_times(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    """Each is a request where the store is a bucket."""
    songs((1, "Sea", "Ann", "waves"))
    pipeline = make_pipeline(database, provider, tmp_path / "store")
    pipeline.export()
    calls.clear()
    pipeline.embed()
    counted = Counter(calls)
    assert counted["read", str(pipeline.cache.storage.root / "texts.json")] <= 3
    assert counted["scan", str(pipeline.cache.storage.root)] <= 5
    assert counted["open", str(pipeline.store.songs.storage.root / f"{FIRST.key}.parquet")] <= 6


def test_storing_vectors_again_takes_calls_in_proportion_to_their_pieces(
    tmp_path: Path, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece that is free is a part: opening all parts for each of them would take the square of their number."""
    monkeypatch.setattr(model_cache, "PIECE_ROWS", 1)

    def count_calls(n_pieces: int) -> int:
        cache = ModelCache(LocalStorage(tmp_path / str(n_pieces)), "m", 3)
        cached = cache.open(SongIdRange(0, 1_000))
        cached.open_writer().write(
            [CachedRows.of(range(n_pieces), [bytes(16)] * n_pieces, np.ones((n_pieces, 3), np.float32))]
        )
        cached.add_written()
        calls.clear()
        reused = cached.rows.with_columns(song_id=cached.rows["song_id"] + 500)
        plan = FillPlan(FillReport(cached.range), deleted=[], reused=reused, texts=[])
        fill_module._RangeFill(None, lambda: None, plan.report)._begin(cached, plan)  # type: ignore[arg-type]
        completion.complete(cached, Completion("snapshot", "text", 0, 0, 0, ""), 0.0)
        assert cache.open(cached.range).rows.height == 2 * n_pieces
        return len(calls)

    few, more, many = map(count_calls, (100, 200, 400))
    assert more < 2.2 * few
    assert many < 2.2 * more


def test_a_dry_run_leaves_every_byte_of_the_store_also_of_what_a_run_would_remove(
    songs: Callable[..., None],
    database: Database,
    provider: Provider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", "stones"), (150, "Moon", "Cy", "a silver light"))
    ranges = {"SONGVEC_RANGE_SIZE": "100", "SONGVEC_SONG_ID_STOP": "1000"}
    for name, value in (environment_of(database, provider, tmp_path) | ranges).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    pipeline = make_pipeline(database, provider, tmp_path / "store")
    pipeline.run()
    root = pipeline.store.storage.root
    [named] = pipeline.cache.read_manifest(FIRST).files
    folder = pipeline.cache.storage.root / FIRST.key
    # of a merge that was not named, of a killed writer, and what the next fill adopts
    for name in (f"0-{'a' * 32}-base.arrow", ".manifest.json.1.tmp", f"0-{'b' * 32}-0.arrow"):
        (folder / name).write_bytes((folder / named.name).read_bytes())
    # of a killed export, and a change that a run would embed
    (root / "songs" / ".000000000-000000100.parquet.1.tmp").write_bytes(b"half")
    songs((2, "Hill", "Ben", "other stones"))
    before = bytes_under(root)
    result = CliRunner().invoke(app, ["run", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert bytes_under(root) == before
    pipeline.run()
    assert bytes_under(root) != before, "a run has something to do here"


def test_a_fill_works_inside_of_a_running_event_loop(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path
) -> None:
    """As in a notebook."""
    songs((1, "Sea", "Ann", "waves"), (150, "Moon", "Cy", "a silver light"))
    pipeline = make_pipeline(database, provider, tmp_path / "store")
    pipeline.export()

    async def fill_in_loop() -> list[FillReport]:
        return fill(pipeline)

    assert [report.n_embedded for report in asyncio.run(fill_in_loop())] == [1, 1]
