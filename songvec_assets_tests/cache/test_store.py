"""The storage root: how it is cut, whose it is, and what becomes of the tail."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from songvec_assets.cache import store as stores
from songvec_assets.cache.manifest import Rejection
from songvec_assets.cache.model_cache import ModelCache, write_embeddings_to_file
from songvec_assets.cache.store import adopt_store, bind_store, look_up
from songvec_assets.errors import StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_value
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.text import hash_text
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.cache.kills import KilledError, killed_after

TILING = Tiling(100, 1_000)
HIGHER = Tiling(100, 1_300)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "deep" / "store"


def open_store(root, *given):
    """The store in a folder."""
    return stores.open_store(LocalStorage(root), *given)


def vector_of(song_id):
    return np.float32([song_id + 1, -song_id, 0.5])


def fill(cache: ModelCache, song_range: SongIdRange, song_ids):
    """Store songs with a vector of their own."""
    cached = cache.open(song_range)
    hashes = [hash_text(str(song_id)) for song_id in song_ids]
    write_embeddings_to_file(cached, song_ids, hashes, np.stack([vector_of(song_id) for song_id in song_ids]))


def read(cache: ModelCache, song_range: SongIdRange):
    """What a range holds: song_id to (text_hash, reason), vectors checked against their songs."""
    cached = cache.open(song_range)
    for rows in cached.iter_vectors(cached.rows["row"]):
        np.testing.assert_array_equal(rows.embeddings, [vector_of(song_id) for song_id in rows.song_ids.tolist()])
    assert cached.find_sound(cached.rows).equals(cached.rows)
    assert cached.damaged == {}
    held = {song_id: (text_hash, None) for song_id, text_hash in cached.rows.select("song_id", "text_hash").iter_rows()}
    return held | {song_id: (text_hash, reason) for song_id, text_hash, reason in cached.rejected.iter_rows()}


def file_of(cache: ModelCache, song_range: SongIdRange) -> Path:
    """The first file of a range."""
    return cache.storage.root / song_range.key / cache.open(song_range).manifest.files[0].name


def embedded(*song_ids):
    return {song_id: (hash_text(str(song_id)), None) for song_id in song_ids}


def files_under(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_a_new_store_is_the_same_store_when_it_is_opened_again(root):
    store = open_store(root, TILING)
    before = files_under(root)
    assert open_store(root, TILING) == store
    assert files_under(root) == before
    assert (store.storage.root, store.tiling) == (root, TILING)


def test_two_stores_have_two_identities(tmp_path):
    assert open_store(tmp_path / "1", TILING).store_id != open_store(tmp_path / "2", TILING).store_id


def test_models_and_sizes_have_folders_of_their_own(root):
    store = open_store(root, TILING)
    assert store.songs.storage.root == root / "songs"
    cache = store.embeddings("fireworks/qwen3-embedding-8b", 2000)
    assert cache.storage.root == root / "embeddings" / "fireworks--qwen3-embedding-8b-2000"
    assert (cache.model, cache.dimensions) == ("fireworks/qwen3-embedding-8b", 2000)
    assert store.embeddings("m", 2).storage != store.embeddings("m", 3).storage


@pytest.mark.parametrize("width", [50, 200])
def test_another_width_is_refused_by_the_name_of_its_setting(root, width):
    store = open_store(root, TILING)
    before = files_under(root)
    with pytest.raises(StoreError, match=f"of 100 song_ids, SONGVEC_RANGE_SIZE is {width}"):
        open_store(root, Tiling(width, 1_000))
    assert files_under(root) == before
    assert open_store(root, TILING) == store


def test_a_lower_stop_is_refused_by_the_name_of_its_setting(root):
    store = open_store(root, TILING)
    with pytest.raises(
        StoreError, match="begins at 1000, SONGVEC_SONG_ID_STOP is 900: it may only grow, so set it to 1000 or more"
    ):
        open_store(root, Tiling(100, 900))
    assert open_store(root, TILING) == store


def test_a_start_is_lowered_at_any_time_and_raised_as_far_as_nothing_is_there(root):
    high = open_store(root, Tiling(100, 2_000, start=1_500))
    assert json.loads((root / "store.json").read_text())["song_id_start"] == 1_500
    assert open_store(root, Tiling(100, 2_000, start=1_000)).store_id == high.store_id
    assert open_store(root, Tiling(100, 2_000, start=1_200)).tiling.start == 1_200
    high.songs.storage.root.mkdir()
    (high.songs.storage.root / "000001300-000001400.parquet").touch()
    assert open_store(root, Tiling(100, 2_000, start=1_300)).tiling.start == 1_300
    with pytest.raises(StoreError, match="from song_id 1300 on, SONGVEC_SONG_ID_START is 1400: set it to 1300"):
        open_store(root, Tiling(100, 2_000, start=1_400))


def test_a_store_of_an_earlier_version_begins_at_0(root):
    open_store(root, TILING)
    path = root / "store.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "song_id_start"}))
    assert open_store(root, TILING).tiling == TILING


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "{}", '"text"'])
def test_a_store_file_that_does_not_parse_is_refused_and_kept(root, content):
    open_store(root, TILING)
    (root / "store.json").write_text(content)
    with pytest.raises(StoreError, match=r"store\.json does not parse .*songvec adopt"):
        open_store(root, TILING)
    assert (root / "store.json").read_text() == content


@pytest.mark.parametrize(
    "changes",
    [
        {"range_size": 0},
        {"range_size": -100},
        {"range_size": "100"},
        {"song_id_stop": 1_050},
        {"song_id_stop": None},
    ],
)
def test_a_store_file_of_impossible_ranges_is_refused(root, changes):
    open_store(root, TILING)
    path = root / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(StoreError, match="does not parse"):
        open_store(root, TILING)


@pytest.mark.parametrize("missing", ["store_id", "range_size", "song_id_stop"])
def test_a_store_file_without_one_of_its_facts_is_refused(root, missing):
    open_store(root, TILING)
    path = root / "store.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != missing}))
    with pytest.raises(StoreError, match=missing):
        open_store(root, TILING)


def test_a_higher_stop_cuts_what_the_tail_held_into_the_new_ranges(root):
    store = open_store(root, TILING)
    cache = store.embeddings("a/model", 3)
    below = SongIdRange(900, 1_000)
    fill(cache, below, [900, 999])
    fill(cache, TILING.tail, [1_000, 1_099, 1_100, 1_299, 1_300, 2**31 - 1])
    tail = cache.open(TILING.tail)
    tail.save(tail.manifest.reject([Rejection(1_050, hash_text("1050"), "too long")]).delete([1_099], 7.0))
    fill(cache, TILING.tail, [1_101])

    higher = open_store(root, HIGHER)
    assert (higher.store_id, higher.tiling) == (store.store_id, HIGHER)
    cache = higher.embeddings("a/model", 3)
    assert [song_range.key for song_range in cache.ranges()] == [
        "000000900-000001000",
        "000001000-000001100",
        "000001100-000001200",
        "000001200-000001300",
        "000001300-max",
    ]
    # what was deleted keeps its vector
    cached = cache.open(SongIdRange(1_000, 1_100))
    assert cached.deleted_rows(0.0)["song_id"].to_list() == [1_099]
    assert cached.manifest.deleted_at == {1_099: 7.0}
    assert read(cache, SongIdRange(1_000, 1_100)) == embedded(1_000) | {1_050: (hash_text("1050"), "too long")}
    assert read(cache, SongIdRange(1_100, 1_200)) == embedded(1_100, 1_101)
    assert read(cache, SongIdRange(1_200, 1_300)) == embedded(1_299)
    assert read(cache, HIGHER.tail) == embedded(1_300, 2**31 - 1)
    assert read(cache, below) == embedded(900, 999)
    before = files_under(root)
    assert open_store(root, HIGHER) == higher
    assert files_under(root) == before


def test_the_tails_of_all_models_are_cut(root):
    store = open_store(root, TILING)
    for model, dimensions in (("a/model", 3), ("offline-v1", 3)):
        fill(store.embeddings(model, dimensions), TILING.tail, [1_005, 5_000])
    higher = open_store(root, HIGHER)
    for model in ("a/model", "offline-v1"):
        cache = higher.embeddings(model, 3)
        assert read(cache, SongIdRange(1_000, 1_100)) == embedded(1_005)
        assert read(cache, HIGHER.tail) == embedded(5_000)


def test_a_store_without_a_tail_only_learns_the_higher_stop(root):
    cache = open_store(root, TILING).embeddings("m", 3)
    fill(cache, SongIdRange(0, 100), [1, 2])
    assert open_store(root, HIGHER).tiling == HIGHER
    assert cache.ranges() == [SongIdRange(0, 100)]
    with pytest.raises(StoreError):
        open_store(root, TILING)


@pytest.mark.parametrize("survives", range(14))
def test_a_cut_that_is_interrupted_anywhere_is_done_again(root, survives):
    cache = open_store(root, TILING).embeddings("m", 3)
    fill(cache, TILING.tail, [1_000, 1_100])
    fill(cache, TILING.tail, [1_500])
    methods = ("write", "put_if_unchanged", "_remove", "delete_all")
    with contextlib.suppress(KilledError), killed_after(survives, methods):
        open_store(root, HIGHER)
        assert survives > 8, "every moment was one to die at"
    open_store(root, HIGHER)
    assert read(cache, SongIdRange(1_000, 1_100)) == embedded(1_000)
    assert read(cache, SongIdRange(1_100, 1_200)) == embedded(1_100)
    assert read(cache, HIGHER.tail) == embedded(1_500)
    assert TILING.tail not in cache.ranges()


def test_a_tail_with_a_damaged_file_is_not_cut_and_says_how_to_mend_it(root):
    cache = open_store(root, TILING).embeddings("m", 3)
    fill(cache, TILING.tail, [1_000])
    fill(cache, TILING.tail, [1_001])
    path = file_of(cache, TILING.tail)
    path.write_bytes(path.read_bytes()[:-1])
    before = files_under(root)
    with pytest.raises(StoreError, match=r"cannot be divided .*set SONGVEC_SONG_ID_STOP back to 1000"):
        open_store(root, HIGHER)
    assert files_under(root) == before


def test_cutting_the_tail_does_not_bless_what_a_disk_changed(root):
    cache = open_store(root, TILING).embeddings("m", 3)
    fill(cache, TILING.tail, [1_000, 1_001])
    path = file_of(cache, TILING.tail)
    content = bytearray(path.read_bytes())
    content[content.index(vector_of(1_001).tobytes())] ^= 4
    path.write_bytes(content)
    open_store(root, HIGHER)
    cached = cache.open(SongIdRange(1_000, 1_100))
    assert cached.rows["song_id"].to_list() == [1_000, 1_001]
    assert cached.find_sound(cached.rows)["song_id"].to_list() == [1_000]


def known_store(database):
    with database.get_connection() as connection:
        return read_value(connection, "store_id")


def test_a_new_database_and_a_new_store_belong_together_from_then_on(database, root):
    store = open_store(root, TILING)
    bind_store(store, database)
    assert known_store(database) == store.store_id
    bind_store(open_store(root, TILING), database)
    bind_store(open_store(root, HIGHER), database)


def test_another_store_is_refused_by_a_database_that_has_one(database, root, tmp_path):
    store, other = open_store(root, TILING), open_store(tmp_path / "other", TILING)
    bind_store(store, database)
    with pytest.raises(StoreError, match="songvec adopt") as refusal:
        bind_store(other, database)
    assert str(other.storage.root) in str(refusal.value)
    assert known_store(database) == store.store_id


def test_the_refusal_does_not_show_the_databases_password(database, root, tmp_path):
    bind_store(open_store(root, TILING), database)
    with_password = Database(database.url.replace("@", ":geheim@", 1))
    with pytest.raises(StoreError) as refusal:
        bind_store(open_store(tmp_path / "other", TILING), with_password)
    assert "geheim" not in str(refusal.value)


def test_adopting_binds_a_store_and_the_former_one_is_refused(database, root, tmp_path):
    former, store = open_store(root, TILING), open_store(tmp_path / "other", TILING)
    bind_store(former, database)
    adopt_store(store, database)
    bind_store(store, database)
    with pytest.raises(StoreError):
        bind_store(former, database)
    adopt_store(former, database)
    bind_store(former, database)


def test_a_store_of_one_database_is_refused_by_a_new_one(database, root):
    """Its default folder is the same for every URL: the songs of another database would count as gone, and what was
    paid for be compacted away."""
    bind_store(open_store(root, TILING), database)
    forget_store(database)
    with pytest.raises(StoreError, match="songvec adopt"):
        bind_store(open_store(root, TILING), database)
    assert known_store(database) is None
    adopt_store(open_store(root, TILING), database)
    bind_store(open_store(root, TILING), database)


@pytest.mark.parametrize("bind", [bind_store, adopt_store])
def test_a_store_remembers_that_it_has_a_database_also_after_its_tail_was_cut(database, root, bind):
    bind(open_store(root, TILING), database)
    open_store(root, HIGHER)
    forget_store(database)
    with pytest.raises(StoreError, match="songvec adopt"):
        bind_store(open_store(root, HIGHER), database)


def forget_store(database):
    """Make it as a new database is: it knows no store."""
    with database.get_connection() as connection:
        connection.exec_driver_sql("TRUNCATE songvec.settings")


def test_the_cut_of_the_tail_is_guarded_and_nothing_else_is(root):
    guarded = []

    @contextlib.contextmanager
    def guard(store):
        guarded.append(store)
        before = cache.ranges()
        yield
        assert cache.ranges() != before

    store = open_store(root, TILING, guard)
    cache = store.embeddings("m", 3)
    fill(cache, TILING.tail, [1_000])
    open_store(root, TILING, guard)
    assert guarded == []
    open_store(root, HIGHER, guard)
    assert guarded == [store]
    open_store(root, HIGHER, guard)
    assert len(guarded) == 1


def test_a_guard_that_is_refused_leaves_everything_as_it_was(root):
    @contextlib.contextmanager
    def refuse(_store):
        raise StoreError("another run fills the tail")
        yield

    cache = open_store(root, TILING).embeddings("m", 3)
    fill(cache, TILING.tail, [1_000])
    before = files_under(root)
    with pytest.raises(StoreError, match="another run"):
        open_store(root, HIGHER, refuse)
    assert files_under(root) == before


def test_a_storage_folder_that_cannot_be_made_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")  # root may write anywhere
    with pytest.raises(
        StoreError, match=r"cannot write to the storage folder .*: Not a directory.* set SONGVEC_STORAGE"
    ):
        open_store(tmp_path / "file" / "store", TILING)


def test_a_store_that_another_first_run_binds_meanwhile_is_taken(
    root: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = stores.find_store

    def find_and_let_another_bind(*given):
        found = find(*given)
        monkeypatch.setattr(stores, "find_store", find)
        bind_store(open_store(root, TILING), database)
        return found

    monkeypatch.setattr(stores, "find_store", find_and_let_another_bind)
    assert look_up(LocalStorage(root), TILING, database) == find(LocalStorage(root), TILING)
    with pytest.raises(StoreError, match="belongs to another database"):
        look_up(LocalStorage(root / "other"), TILING, database)
