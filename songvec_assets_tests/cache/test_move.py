"""A store that moves between a folder and a bucket: all arrives, checked, whatever interrupts it; nothing is paid."""

import itertools

import numpy as np
import pytest

from songvec_assets.cache import move
from songvec_assets.cache.move import move_store
from songvec_assets.cache.store import bind_store, open_store
from songvec_assets.errors import SettingsError, StoppedError, StoreError
from songvec_assets.postgres.locks import hold_lock
from songvec_assets.progress import SILENT, RunContext, StopSignal
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage import open_storage
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.cache.kills import KilledError, killed_after
from songvec_assets_tests.conftest import TILING, make_pipeline


def content_of(storage):
    """All objects, without the record that they are a store."""
    return {key: storage.read(key).content for key, _ in storage.list_keys() if "/" in key}


@pytest.fixture
def filled(songs, database, provider, tmp_path):
    """A pipeline over a folder, with songs in two ranges that were exported, embedded and loaded."""
    songs(*((number, f"Song {number}", "Ann", "la") for number in (*range(1, 40), *range(150, 180))))
    pipeline = make_pipeline(database, provider, tmp_path / "from")
    pipeline.run()
    return pipeline


def test_a_moved_store_goes_on_where_it_was_and_pays_nothing(filled, bucket, database, provider):
    source, target, store = filled.storage, open_storage(bucket), filled.store
    before, n_requests = content_of(source), provider.ledger()["requests"]
    report = move_store(source, target, TILING, database, SILENT)
    assert content_of(target) == before == content_of(source)
    assert (report.n_objects, report.n_copied, report.damaged) == (len(before), len(before), [])
    assert report.n_bytes == sum(map(len, before.values()))
    moved = make_pipeline(database, provider, bucket)
    assert moved.store.store_id == store.store_id
    assert [(each.n_unchanged, each.n_embedded) for each in moved.run().embed] == [(39, 0), (30, 0)]
    assert provider.ledger()["requests"] == n_requests
    with pytest.raises(StoreError, match="belongs to another database"):
        make_pipeline(database, provider, str(source)).run()
    with pytest.raises(StoreError, match="holds no store") as caught:
        move_store(source, target, TILING, database, SILENT)
    assert caught.value.code == "store.missing"


def test_a_move_that_is_stopped_after_any_object_goes_on_from_there(filled, tmp_path, database):
    before = content_of(filled.storage)
    target, copied = LocalStorage(tmp_path / "to"), 0
    for n_passing in (1, 0, 2, 99):
        stop, n_left = StopSignal(), n_passing

        def step(progress, stop=stop):
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                stop.set()

        try:
            copied += move_store(filled.storage, target, TILING, database, RunContext(step, stop)).n_copied
        except StoppedError:
            assert not target.read("store.json"), "no run can take it for a store"
            assert filled.storage.read("store.json")
    assert content_of(target) == before
    # snapshots and manifests are replaced in place, so that they are copied again
    assert 0 < copied <= len(before)


def test_a_move_that_dies_before_any_of_its_writes_leaves_one_store_and_goes_on(filled, tmp_path, database):
    before, target = content_of(filled.storage), LocalStorage(tmp_path / "to")
    for n_passing in itertools.count():
        try:
            with killed_after(n_passing, ("write", "put_if_unchanged", "delete")):
                move_store(filled.storage, target, TILING, database, SILENT)
            break
        except KilledError:
            assert filled.storage.read("store.json") or target.read("store.json")
            assert content_of(filled.storage) == before
            assert n_passing < 100
        except StoreError as error:  # it died when all was done but the record of the move
            assert error.code == "store.missing"
            break
    assert content_of(target) == before
    assert target.read("store.json") and not filled.storage.read("store.json")


def test_what_changed_or_was_merged_since_an_interrupted_try_is_brought_up_to_date(filled, tmp_path, database):
    target = LocalStorage(tmp_path / "to")
    with pytest.raises(StoppedError):
        stop = StopSignal()
        move_store(filled.storage, target, TILING, database, RunContext(lambda _: stop.set(), stop))
    target.put("embeddings/m-3/000000000-000000100/0-" + "a" * 32 + "-7.arrow", b"merged since")
    [(key, part), *_] = [(key, each) for key, each in content_of(filled.storage).items() if key.endswith(".arrow")]
    spoilt = bytearray(part)
    spoilt[len(part) // 2] ^= 1
    target.put(key, bytes(spoilt))
    move_store(filled.storage, target, TILING, database, SILENT)
    assert content_of(target) == content_of(filled.storage)


def test_a_part_that_was_damaged_before_is_copied_and_named(filled, tmp_path, database):
    [(key, part), *_] = [(key, each) for key, each in content_of(filled.storage).items() if key.endswith(".arrow")]
    vector = filled.cache.open(SongIdRange(0, 100)).embeddings_at([0]).astype(np.float32).tobytes()
    spoilt = bytearray(part)
    spoilt[part.index(vector)] ^= 1
    filled.storage.put(key, bytes(spoilt))
    report = move_store(filled.storage, LocalStorage(tmp_path / "to"), TILING, database, SILENT)
    [damaged] = report.damaged
    assert damaged == f"{filled.storage.describe(key)}: 1 of its vectors do not match their checksums"


def test_what_arrives_otherwise_than_it_was_sent_is_no_move(filled, tmp_path, database, monkeypatch):
    target, read = LocalStorage(tmp_path / "to"), move._read
    monkeypatch.setattr(
        move, "_read", lambda storage, key: iter([b"another"]) if storage == target else read(storage, key)
    )
    with pytest.raises(StoreError, match="differs from what was sent"):
        move_store(filled.storage, target, TILING, database, SILENT)
    assert filled.storage.read("store.json") and not target.read("store.json")


def test_a_part_that_a_bucket_gives_back_with_a_flipped_bit_is_no_move(filled, s3, bucket, database):
    s3.spoil({"do": "flip", "method": "GET", "match": "arrow$"})
    with pytest.raises(StoreError, match="differs from what was sent") as caught:
        move_store(filled.storage, open_storage(bucket), TILING, database, SILENT)
    assert caught.value.code == "store.damaged"
    assert filled.storage.read("store.json") and not open_storage(bucket).read("store.json")
    s3.spoil()
    move_store(filled.storage, open_storage(bucket), TILING, database, SILENT)


def test_a_target_that_is_another_store_or_the_same_place_is_refused(filled, tmp_path, database):
    other = LocalStorage(tmp_path / "other")
    open_store(other, TILING)
    with pytest.raises(StoreError, match="is of another store") as caught:
        move_store(filled.storage, other, TILING, database, SILENT)
    assert caught.value.code == "store.occupied"
    for target in (filled.storage, filled.storage.within("deeper"), LocalStorage(tmp_path)):
        with pytest.raises(SettingsError, match="two places apart"):
            move_store(filled.storage, target, TILING, database, SILENT)
    assert filled.storage.read("store.json")


def test_a_store_of_another_database_is_refused(filled, tmp_path, database):
    other = LocalStorage(tmp_path / "other")
    open_store(other, TILING)
    with pytest.raises(StoreError, match="belongs to another database"):
        move_store(other, LocalStorage(tmp_path / "to"), TILING, database, SILENT)
    with pytest.raises(StoreError):
        bind_store(open_store(other, TILING), database)


def test_a_move_waits_for_fills_and_they_for_it(filled, tmp_path, database):
    waited = []

    def give_up(progress):
        waited.append(progress.note)
        stop.set()

    stop = StopSignal()
    with (
        hold_lock(database, "fill 000000100-000000200", lambda: None, lambda: None),
        pytest.raises(StoppedError),
    ):
        move_store(filled.storage, LocalStorage(tmp_path / "to"), TILING, database, RunContext(give_up, stop))
    assert waited == ["another run fills ranges of this store: waiting for it"]
