"""What a load would do is known without doing it, and each thing is read once."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import DamagedCacheError
from songvec_assets.postgres.engine import Database
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.plan import plan_load
from songvec_assets.vectors.swap import WantedTable, bring_table_up_to_date
from songvec_assets.vectors.table import VectorTable
from songvec_assets_tests.vectors.conftest import FIRST, SECOND, SPEC, complete, load, put, read_writers, source_of
from songvec_assets_tests.vectors.indexes import build_index


class TestPlan:
    def test_it_changes_nothing_not_even_for_a_range_that_cannot_be_read(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, range(150))
        load(database, cache)
        put(cache, [3], version=1)
        manifest = cache.storage.root / SECOND.key / "manifest.json"
        manifest.write_bytes(b"no manifest")
        before = read_folder(cache.storage.root), read_writers(database)
        plan = plan_load(VectorTable(database), source_of(cache))
        assert (plan.changed, plan.unchanged, plan.n_changed, list(plan.damaged)) == ({FIRST: 100}, {}, 1, [SECOND])
        assert (read_folder(cache.storage.root), read_writers(database)) == before
        with pytest.raises(DamagedCacheError, match=r"manifest\.json does not parse"):
            load(database, cache)


def read_folder(folder: Path) -> dict[Path, bytes]:
    """The content of every file."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestNothingToDo:
    """A run that has nothing to do reads each thing once."""

    def test_the_ledger_is_read_once_the_primary_key_scanned_once_and_each_file_opened_once(
        self, database: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(cache, range(150))
        for song_range in (FIRST, SECOND):
            complete(cache, song_range)
        wanted, source = WantedTable(SPEC), source_of(cache)
        bring_table_up_to_date(database, source, wanted)
        build_index(database, cache)
        opened: list[str] = []
        open_object = LocalStorage.open

        def note(storage: LocalStorage, key: str) -> pa.Buffer:
            opened.append(key)
            return open_object(storage, key)

        monkeypatch.setattr(LocalStorage, "open", note)
        before = read_writers(database)
        with sent_statements() as statements:
            report = bring_table_up_to_date(database, source, wanted)
        assert [(each.n_rows, each.n_written, each.n_deleted) for each in report.loads] == [(100, 0, 0), (50, 0, 0)]
        assert read_writers(database) == before
        assert sum("loaded_ranges" in each for each in statements) == 1
        assert sum("FROM song_embeddings" in each for each in statements) == 1
        assert len(opened) == len(set(opened)) == 2
        assert [each for each in statements if each.split()[0] not in ("SELECT", "BEGIN")] == []


@contextlib.contextmanager
def sent_statements() -> Iterator[list[str]]:
    """The statements that SQLAlchemy's engines of this process send while the block runs."""
    sent: list[str] = []

    def listen(*arguments: object) -> None:
        sent.append(str(arguments[2]).strip())

    sa.event.listen(sa.Engine, "before_cursor_execute", listen)
    try:
        yield sent
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", listen)
