"""The cache format: what was acknowledged is there, whatever happens to the file's end; damage is found, not served."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from songvec_assets.cache.format import ShardIdentity, checksum_rows

from songvec_assets.cache.shards import (
    ModelCache,
    Shard,
    load_embeddings_from_cache,
    read_embeddings_from_file,
    read_identity,
    write_embeddings_to_file,
)
from songvec_assets.cache.upkeep import compact_if_worth_it, discard_damaged_rows, rows_to_keep, write_shard
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import hash_text
from songvec_assets.storage import Storage

IDENTITY = ShardIdentity("a/model", 3, SongIdRange(0, 100))
Content = dict[int, tuple[bytes, str | None, bytes | None]]


@dataclass(frozen=True)
class Append:
    """One append: songs that get a vector, a reason (they are set aside), or neither (they are gone)."""

    kind: str
    song_ids: list[int]
    seed: int

    def rows(self) -> list[tuple[bytes, str | None, bytes | None]]:
        """What each song is after it: text_hash, reason, vector."""
        hashes = [hash_text(f"{self.seed} {song_id}") for song_id in self.song_ids]
        reason = f"refused, grund {self.seed} ü" if self.kind == "set aside" else None
        vectors = [row.tobytes() if self.kind == "vectors" else None for row in self.vectors()]
        return [(text_hash, reason, vector) for text_hash, vector in zip(hashes, vectors, strict=True)]

    def vectors(self):
        return np.random.default_rng(self.seed).normal(size=(len(self.song_ids), 3)).astype(np.float32)

    def apply(self, shard: Shard, content: Content) -> None:
        """Append to a shard, and to what a reader must find."""
        hashes = [text_hash for text_hash, _, _ in self.rows()]
        if self.kind == "vectors":
            write_embeddings_to_file(shard, self.song_ids, hashes, self.vectors())
        elif self.kind == "set aside":
            shard.append_set_aside(self.song_ids, hashes, str(self.rows()[0][1]))
        else:
            shard.append_gone(self.song_ids)
        for song_id, row in zip(self.song_ids, self.rows(), strict=True):
            if self.kind == "gone":
                content.pop(song_id, None)
            else:
                content[song_id] = row


APPENDS = st.builds(
    Append,
    st.sampled_from(["vectors", "vectors", "set aside", "gone"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(0, 1000),
)
LOGS = st.lists(APPENDS, min_size=1, max_size=6)
PROFILE = settings(deadline=None, max_examples=40)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "embeddings" / "range.arrow"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For property tests: each example takes a new file name in it."""
    return tmp_path_factory.mktemp("shards")


def new_path(folder):
    return Path(tempfile.mkdtemp(dir=folder)) / "range.arrow"


def open_shard(path):
    return Shard(path, IDENTITY)


def content_of(shard) -> Content:
    """What a reader finds, by both ways of reading vectors, checksums checked."""
    rows = shard.live_rows().rows()
    assert [song_id for song_id, *_ in rows] == sorted({song_id for song_id, *_ in rows})
    embedded = {
        song_id: (text_hash, checksum, place) for song_id, text_hash, checksum, reason, place in rows if not reason
    }
    backwards = list(embedded)[::-1]
    vectors = shard.embeddings_at([embedded[song_id][2] for song_id in backwards])
    by_place = {song_id: vector.tobytes() for song_id, vector in zip(backwards, vectors, strict=True)}
    by_batch = {}
    for piece in read_embeddings_from_file(
        shard, pl.Series([place for _, _, place in embedded.values()], dtype=pl.Int64)
    ):
        song_ids = piece.song_ids.tolist()
        hashes = [embedded[song_id][0] for song_id in song_ids]
        assert checksum_rows(piece.song_ids, hashes, piece.embeddings).tolist() == piece.checksums.tolist()
        assert piece.checksums.tolist() == [embedded[song_id][1] for song_id in song_ids]
        by_batch.update(zip(song_ids, (vector.tobytes() for vector in piece.embeddings), strict=True))
    assert by_batch == by_place
    return {song_id: (text_hash, reason, by_batch.get(song_id)) for song_id, text_hash, _, reason, _ in rows}


def write_log(path, log):
    """Apply appends; what the file's size and content were after each, an empty file first."""
    shard, content, states = open_shard(path), {}, [(0, {})]
    for append in log:
        append.apply(shard, content)
        states.append((path.stat().st_size, dict(content)))
    return shard, states


@PROFILE
@given(log=LOGS)
def test_after_any_appends_the_last_row_of_a_song_holds(folder, log):
    path = new_path(folder)
    shard, states = write_log(path, log)
    assert content_of(shard) == states[-1][1]
    assert content_of(open_shard(path)) == states[-1][1]
    assert shard.n_bytes_damaged == open_shard(path).n_bytes_damaged == 0


@PROFILE
@given(log=LOGS, last=APPENDS, reopen=st.booleans())
def test_a_reader_sees_appends_made_since_it_last_looked(folder, log, last, reopen):
    path = new_path(folder)
    shard, states = write_log(path, log)
    content_of(shard)
    content = dict(states[-1][1])
    last.apply(open_shard(path) if reopen else shard, content)
    assert content_of(open_shard(path) if reopen else shard) == content


def test_a_file_cut_at_any_byte_holds_exactly_the_whole_batches_before_the_cut(path):
    log = [Append("vectors", [1, 2, 3], 1), Append("set aside", [2, 4], 2), Append("gone", [1], 3)]
    _, states = write_log(path, log)
    whole = path.read_bytes()
    schema = len(IDENTITY.schema.serialize())
    cut = path.with_name("cut.arrow")
    for size in range(len(whole) + 1):
        cut.unlink(missing_ok=True)
        cut.write_bytes(whole[:size])
        kept, content = max((state for state in states if state[0] <= size), key=lambda state: state[0])
        shard = open_shard(cut)
        assert content_of(shard) == content, f"cut at {size}"
        assert shard.n_bytes_damaged == size - (kept or (schema if size >= schema else 0)), f"cut at {size}"


@PROFILE
@given(log=LOGS, following=st.lists(APPENDS, min_size=1, max_size=2), data=st.data())
def test_appends_after_a_cut_at_any_byte_follow_the_whole_batches(folder, log, following, data):
    path = new_path(folder)
    _, states = write_log(path, log)
    size = data.draw(st.integers(0, states[-1][0]))
    os.truncate(path, size)
    content = dict(max((state for state in states if state[0] <= size), key=lambda state: state[0])[1])
    shard = open_shard(path)
    for append in following:
        append.apply(shard, content)
    assert content_of(shard) == content
    assert content_of(open_shard(path)) == content
    assert open_shard(path).n_bytes_damaged == 0


@PROFILE
@given(
    log=LOGS,
    torn=st.binary(min_size=1, max_size=80) | st.integers(1, 5000).map(bytes),
    following=APPENDS,
)
def test_whatever_a_torn_write_left_is_told_and_cut_off_by_the_next_append(folder, log, torn, following):
    path = new_path(folder)
    _, states = write_log(path, log)
    with path.open("ab") as file:
        file.write(torn)
    content = dict(states[-1][1])
    shard = open_shard(path)
    assert content_of(shard) == content
    assert shard.n_bytes_damaged == len(torn)
    following.apply(shard, content)
    assert content_of(open_shard(path)) == content
    assert open_shard(path).n_bytes_damaged == 0


@PROFILE
@given(log=LOGS, data=st.data(), column=st.sampled_from(["vector", "text_hash", "checksum"]))
def test_a_flipped_bit_is_found_and_only_that_song_is_dropped(folder, log, data, column):
    path = new_path(folder)
    log = [Append("vectors", list(range(20, 26)), 1001), *log]
    shard, states = write_log(path, log)
    song_id = data.draw(st.integers(20, 25))
    text_hash, _, vector = states[-1][1][song_id]
    checksum = shard.live_rows().row(by_predicate=pl.col("song_id") == song_id, named=True)["checksum"]
    stored = {"vector": vector, "text_hash": text_hash, "checksum": checksum.to_bytes(8, "little")}[column]
    flip_bit(path, stored, data.draw(st.integers(0, 8 * len(stored) - 1)))
    shard = open_shard(path)
    assert discard_damaged_rows(shard) == [song_id]
    expected = {each: row for each, row in states[-1][1].items() if each != song_id}
    assert content_of(shard) == expected
    assert content_of(open_shard(path)) == expected
    assert discard_damaged_rows(open_shard(path)) == []


def flip_bit(path, stored, bit):
    """Flip one bit of a value that is in the file once."""
    content = bytearray(path.read_bytes())
    assert content.count(stored) == 1
    content[content.index(stored) + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_write_that_the_disk_refuses_is_told_and_the_next_one_goes_on(path, monkeypatch):
    shard, states = write_log(path, [Append("vectors", [1, 2], 1)])
    content = dict(states[-1][1])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StoreError, match=r"No space left.*make room"):
            shard.append_gone([1])
    Append("vectors", [3], 2).apply(shard, content)
    assert content_of(open_shard(path)) == content
    assert open_shard(path).n_bytes_damaged == 0


@pytest.mark.parametrize("column", ["song_id", "text_hash", "checksum"])
@pytest.mark.parametrize("kind", ["set_aside", "gone"])
def test_a_flipped_bit_makes_no_song_gone_or_set_aside(path, kind, column):
    shard, states = write_log(path, [Append("vectors", [1, 2, 3, 32, 33], 1)])
    content = dict(states[-1][1])
    before = path.stat().st_size
    if kind == "gone":
        shard.append_gone([33])
    else:
        shard.append_set_aside([33], [bytes(range(16))], "refused")
    row = shard.all_rows().row(-1, named=True)
    stored = {
        "song_id": (33).to_bytes(8, "little"),
        "text_hash": row["text_hash"],
        "checksum": row["checksum"].to_bytes(8, "little"),
    }[column]
    whole = bytearray(path.read_bytes())
    whole[whole.rindex(stored)] ^= 1
    assert whole.rindex(stored[1:]) > before
    path.write_bytes(whole)
    shard = open_shard(path)
    assert content_of(shard) == content
    assert shard.n_bytes_damaged > 0


def test_a_damaged_schema_costs_no_row_and_is_written_anew(path):
    _, states = write_log(path, [Append("vectors", [1, 2, 3], 1), Append("vectors", [4, 5], 2)])
    whole = path.read_bytes()
    for position in range(120):
        damaged = bytearray(whole)
        damaged[position] ^= 16
        path.write_bytes(damaged)
        shard = open_shard(path)
        assert content_of(shard) == states[-1][1]
        # what can still be read of it may be enough to know the shard by
        is_damaged = shard.n_bytes_damaged > 0
        assert compact_if_worth_it(shard) == is_damaged
        assert open_shard(path).n_bytes_damaged == 0
        assert content_of(open_shard(path)) == states[-1][1]


def test_a_song_that_was_dropped_can_be_stored_again(path):
    shard, states = write_log(path, [Append("vectors", [1, 2, 3], 1)])
    flip_bit(path, states[-1][1][2][2], 5)
    shard, content = open_shard(path), dict(states[-1][1])
    discard_damaged_rows(shard)
    Append("vectors", [2], 7).apply(shard, content)
    assert content_of(open_shard(path)) == content
    assert discard_damaged_rows(open_shard(path)) == []


def test_an_undamaged_shard_is_left_as_it_is(path):
    shard, _ = write_log(path, [Append("vectors", [1, 2], 1), Append("set aside", [3], 2)])
    before = path.read_bytes()
    assert discard_damaged_rows(shard) == []
    assert path.read_bytes() == before


FLIP_EVERY_BYTE = """
import sys
from pathlib import Path
import polars as pl
from songvec_assets.cache.format import ShardIdentity
from songvec_assets.storage import Storage
from songvec_assets.cache.shards import Shard
from songvec_assets.errors import SongvecError
from songvec_assets.songs.ranges import SongIdRange

def content_of(path):
    shard = Shard(path, ShardIdentity("a/model", 3, SongIdRange(0, 100)))
    sound = shard.find_sound(shard.live_rows().filter(pl.col("reason").is_null()))
    vectors = (vector.tobytes() for vector in shard.embeddings_at(sound["row"].to_list()))
    return set(zip(sound["song_id"], sound["text_hash"], vectors))

path = Path(sys.argv[1])
whole, stored = path.read_bytes(), content_of(path)
stops = [int(stop) for stop in sys.argv[2:]]
flipped = path.with_name("flipped.arrow")
for position in range(stops[-2]):
    content = bytearray(whole)
    content[position] ^= 1 << position % 8
    flipped.unlink(missing_ok=True)
    flipped.write_bytes(content)
    print(position, end=" ", flush=True)
    # songs 10 and 11 are of the first batch, 20 and 21 of the second, and so on
    damaged = sum(position >= stop for stop in stops)
    try:
        found = content_of(flipped)
    except SongvecError:
        print("refused" if damaged == 0 else "refused: but only a batch is damaged")
    except BaseException as error:
        print(type(error).__name__, error)
    else:
        untouched = {row for row in stored if row[0] // 10 != damaged}
        print("well" if untouched <= found <= stored else "something else was found")
"""


def test_a_flipped_bit_anywhere_costs_at_most_its_own_batch_or_is_refused(path):
    """Never a dead process, a library's panic, or a vector that nobody stored."""
    log = [Append("vectors", [10, 11], 1), Append("set aside", [50], 2), Append("vectors", [30, 31], 3)]
    _, states = write_log(path, log)
    stops = [len(IDENTITY.schema.serialize()), *(size for size, _ in states[1:])]
    command = [sys.executable, "-W", "ignore", "-c", FLIP_EVERY_BYTE, str(path), *map(str, stops)]
    reader = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = reader.stdout.splitlines()
    assert reader.returncode == 0, f"ended with {reader.returncode} after byte {lines[-1]} was flipped"
    assert [line for line in lines if not line.endswith((" well", " refused"))] == []
    assert len(lines) == stops[-2]


def test_damage_between_sound_batches_is_passed_over_told_and_kept(path):
    log = [Append("vectors", [1, 2], 1), Append("vectors", [3], 2), Append("vectors", [4, 5], 3)]
    _, states = write_log(path, log)
    (first, _), (second, _) = states[1:3]
    content = bytearray(path.read_bytes())
    content[first : first + 64] = bytes(64)
    path.write_bytes(content)
    expected = {song_id: row for song_id, row in states[-1][1].items() if song_id != 3}
    shard = open_shard(path)
    assert content_of(shard) == expected
    assert shard.n_bytes_damaged == second - first
    Append("vectors", [6], 4).apply(shard, expected)
    assert path.read_bytes().startswith(content)
    for each in (shard, open_shard(path)):
        assert content_of(each) == expected
        assert each.n_bytes_damaged == second - first


def test_a_shard_that_somebody_else_wrote_since_is_not_written_over(path):
    """As when the database that holds the lock restarts: two runs fill one range."""
    _, states = write_log(path, [Append("vectors", [1], 1)])
    one, other = open_shard(path), open_shard(path)
    content = dict(states[-1][1])
    Append("vectors", [2], 2).apply(one, content)
    with pytest.raises(StoreError, match="changed by another process"):
        Append("vectors", [3], 3).apply(other, {})
    assert content_of(open_shard(path)) == content


def test_all_rows_are_told_those_that_no_longer_hold_among_them(path):
    """Whatever was paid for can serve again: a text may come back."""
    log = [Append("vectors", [1, 2], 1), Append("gone", [1], 2), Append("set aside", [2], 3), Append("vectors", [1], 4)]
    shard, _ = write_log(path, log)
    rows = shard.all_rows()
    assert rows.select("song_id", "has_vector", "row").rows() == [
        (1, True, 0),
        (2, True, 1),
        (1, False, 2),
        (2, False, 3),
        (1, True, 4),
    ]
    vectors = rows.filter("has_vector")
    np.testing.assert_array_equal(
        shard.embeddings_at(vectors["row"].to_list()), np.concatenate([log[0].vectors(), log[3].vectors()])
    )
    assert shard.find_sound(vectors).equals(vectors)


def test_only_sound_rows_are_found_sound(path):
    _, states = write_log(path, [Append("vectors", [1, 2, 3], 1)])
    flip_bit(path, states[-1][1][2][2], 3)
    shard = open_shard(path)
    assert shard.find_sound(shard.live_rows())["song_id"].to_list() == [1, 3]
    assert shard.find_sound(shard.live_rows().head(0)).is_empty()


def test_a_song_without_a_vector_takes_no_room_for_one(path):
    identity = ShardIdentity("m", 2000, SongIdRange(0, 100))
    Shard(path, identity).append_set_aside(list(range(100)), [bytes(16)] * 100, "why")
    assert path.stat().st_size < 100 * 100


MANY = [
    Append("vectors", list(range(10)), 1),
    Append("vectors", [1, 3, 5], 2),
    Append("set aside", [4, 7], 3),
    Append("gone", [9], 4),
]


@PROFILE
@given(log=LOGS, following=APPENDS)
def test_compaction_keeps_what_is_live_and_drops_what_is_dead(folder, log, following):
    path = new_path(folder)
    shard, states = write_log(path, log)
    content = dict(states[-1][1])
    n_rows = sum(len(append.song_ids) for append in log)
    before = path.read_bytes()
    worth_it = n_rows - len(content) > 0.2 * n_rows
    assert compact_if_worth_it(shard) == worth_it
    if worth_it:
        assert sum(batch.num_rows for batch in open_shard(path).batches()) == len(content)
    else:
        assert path.read_bytes() == before
    assert content_of(shard) == content
    reopened = open_shard(path)
    following.apply(reopened, content)
    assert content_of(open_shard(path)) == content


def test_live_rows_are_identical_after_compaction(path):
    shard, _ = write_log(path, MANY)
    before, size = shard.live_rows().drop("row"), path.stat().st_size
    assert compact_if_worth_it(shard)
    assert open_shard(path).live_rows().drop("row").equals(before)
    assert path.stat().st_size < size
    assert not compact_if_worth_it(open_shard(path))
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("n_dead", [2, 3])
def test_compaction_waits_until_over_a_fifth_is_dead(path, n_dead):
    shard, _ = write_log(path, [Append("vectors", list(range(8)), 1), Append("vectors", [0, 1, 2][:n_dead], 2)])
    assert compact_if_worth_it(shard) == (n_dead == 3)


def test_a_shard_takes_appends_right_after_it_was_compacted(path):
    shard, states = write_log(path, MANY)
    content = dict(states[-1][1])
    assert compact_if_worth_it(shard)
    Append("vectors", [50, 51], 5).apply(shard, content)
    assert content_of(open_shard(path)) == content
    assert content_of(shard) == content


def test_a_shard_knows_right_after_it_was_compacted_that_nothing_is_damaged(path):
    shard, _ = write_log(path, MANY)
    assert compact_if_worth_it(shard)
    assert shard.n_bytes_damaged == 0


def test_compaction_does_not_bless_what_a_disk_changed(path):
    """A checksum made anew over a damaged vector would never find it."""
    _, states = write_log(path, MANY)
    flip_bit(path, states[-1][1][2][2], 9)
    assert compact_if_worth_it(open_shard(path))
    assert discard_damaged_rows(open_shard(path)) == [2]


def test_a_reader_keeps_its_rows_while_the_file_is_compacted_and_appended_to(path):
    _, states = write_log(path, MANY)
    reader, writer = open_shard(path), open_shard(path)
    live = reader.live_rows()
    assert compact_if_worth_it(writer)
    Append("vectors", [60], 6).apply(open_shard(path), {})
    assert reader.live_rows().equals(live)
    assert content_of(reader) == states[-1][1]


def test_compaction_of_many_pieces_keeps_every_vector_with_its_song(path):
    """More rows than one piece holds, set-aside songs among them, in an order that is not the song_ids'."""
    identity = ShardIdentity("m", 2, SongIdRange(0, 10_000))
    shard = Shard(path, identity)
    song_ids = np.random.default_rng(0).permutation(5_000)
    embeddings = np.stack([song_ids + 1, song_ids * 2], axis=1).astype(np.float32)
    hashes = [hash_text(str(song_id)) for song_id in song_ids]
    for piece in (slice(0, 3_000), slice(3_000, 5_000)):
        write_embeddings_to_file(shard, song_ids[piece].tolist(), hashes[piece], embeddings[piece])
    shard.append_gone([song_id for song_id in range(5_000) if song_id % 4 == 0])
    shard.append_set_aside([5_001, 17], [bytes(16)] * 2, "too long")
    assert compact_if_worth_it(shard)
    shard = Shard(path, identity)
    live = shard.live_rows()
    expected = sorted({song_id for song_id in range(5_000) if song_id % 4} | {5_001})
    assert live["song_id"].to_list() == expected
    assert dict(live.filter(pl.col("reason").is_not_null()).select("song_id", "reason").iter_rows()) == {
        17: "too long",
        5_001: "too long",
    }
    found = {}
    for rows in read_embeddings_from_file(shard, live.filter(pl.col("reason").is_null())["row"]):
        found.update(zip(rows.song_ids.tolist(), rows.embeddings.tolist(), strict=True))
    assert found == {each: [each + 1.0, each * 2.0] for each in expected if each not in (17, 5_001)}
    assert discard_damaged_rows(shard) == []


def test_reading_some_rows_gives_those_and_no_others(path):
    shard, states = write_log(path, [Append("vectors", [1, 2, 3], 1), Append("vectors", [4, 5], 2)])
    live = shard.live_rows()
    wanted = live.filter(pl.col("song_id").is_in([2, 4, 5]))["row"]
    pieces = list(read_embeddings_from_file(shard, wanted))
    assert [rows.song_ids.tolist() for rows in pieces] == [[2], [4, 5]]
    assert pieces[0].embeddings[0].tobytes() == states[-1][1][2][2]
    assert list(read_embeddings_from_file(shard, wanted.head(0))) == []


@pytest.mark.parametrize(
    "other",
    [
        replace(IDENTITY, model="another/model"),
        replace(IDENTITY, dimensions=4),
        replace(IDENTITY, range=SongIdRange(100, 200)),
    ],
)
def test_a_shard_of_another_model_size_or_range_is_refused_and_left_alone(path, other):
    write_log(path, MANY)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"range\.arrow holds .* expected .*move it away"):
        Shard(path, other)
    assert path.read_bytes() == before


def test_an_arrow_file_of_somebody_else_is_refused(path):
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        pl.DataFrame({"x": [1]}).write_ipc_stream(file)
    with pytest.raises(StoreError):
        open_shard(path)


@pytest.mark.parametrize(
    "embeddings",
    [
        np.ones((2, 4), np.float32),
        np.ones((1, 3), np.float32),
        np.float32([[1, 1, 1], [0, 0, 0]]),
        np.float32([[1, 1, 1], [1, np.nan, 1]]),
        np.float32([[np.inf, 1, 1], [1, 1, 1]]),
    ],
)
def test_vectors_that_no_search_could_use_are_refused_before_anything_is_written(path, embeddings):
    shard = open_shard(path)
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        write_embeddings_to_file(shard, [1, 2], [bytes(16)] * 2, embeddings)
    assert not path.exists()


def test_no_rows_are_no_write(path):
    shard = open_shard(path)
    shard.append_gone([])
    shard.append_set_aside([], [], "why")
    write_embeddings_to_file(shard, [], [], np.empty((0, 3), np.float32))
    assert not path.parent.exists()
    assert content_of(shard) == {}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_an_append_is_whole_and_synced_before_it_returns(path, monkeypatch):
    """The one place that looks at fsync itself: no test can cut the power."""
    synced = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    shard, content = open_shard(path), {}
    Append("vectors", [1, 2], 1).apply(shard, content)
    assert (path, path.stat().st_size) in synced
    assert path.parent in [name for name, _ in synced], "a new file's name must be on disk too"
    Append("set aside", [3], 2).apply(shard, content)
    assert synced[-1] == (path, path.stat().st_size)


def test_a_range_without_a_file_holds_nothing(tmp_path):
    cache = ModelCache(Storage(tmp_path / "none"), "m", 3)
    shard, live = load_embeddings_from_cache(cache, SongIdRange(0, 100))
    assert live.is_empty()
    assert live.columns == ["song_id", "text_hash", "checksum", "reason", "row"]
    assert shard.n_bytes_damaged == 0
    assert not compact_if_worth_it(shard)
    assert discard_damaged_rows(shard) == []
    assert cache.ranges() == []
    assert not cache.folder.exists()


def test_a_model_cache_knows_its_ranges_in_their_order(tmp_path):
    cache = ModelCache(Storage(tmp_path / "m-3"), "m", 3)
    ranges = [SongIdRange(0, 100), SongIdRange(100, 200), SongIdRange(1000, 2**31)]
    for song_range in reversed(ranges):
        shard, _ = load_embeddings_from_cache(cache, song_range)
        shard.append_set_aside([song_range.start], [bytes(16)], "why")
    (cache.storage.root / ".000000300-000000400.arrow.77.tmp").write_bytes(b"left behind by a crash")
    assert cache.ranges() == ranges
    _, live = load_embeddings_from_cache(cache, ranges[2])
    assert live["song_id"].to_list() == [1000]
    assert cache.path_of(ranges[2]).name == "000001000-max.arrow"


def test_a_shard_says_what_it_holds(path):
    assert read_identity(path) is None
    write_log(path, [Append("gone", [1], 1)])
    assert read_identity(path) == IDENTITY
    os.truncate(path, 50)
    assert read_identity(path) is None
    path.write_bytes(b"no shard at all, but a few words of somebody else")
    assert read_identity(path) is None


def test_a_shard_written_from_another_holds_the_rows_chosen_of_it(tmp_path):
    source, states = write_log(tmp_path / "1.arrow", MANY)
    chosen = rows_to_keep(source).filter(pl.col("song_id").is_between(3, 7))
    write_shard(tmp_path / "2.arrow", IDENTITY, source, chosen)
    expected = {song_id: row for song_id, row in states[-1][1].items() if 3 <= song_id <= 7}
    assert content_of(open_shard(tmp_path / "2.arrow")) == expected


def put_again(path, n_times):
    """Song 9 gets a vector so many times: all of its rows but one are dead."""
    shard = open_shard(path)
    for seed in range(n_times):
        Append("vectors", [9], 50 + seed).apply(shard, {})
    return shard


def test_vectors_of_deleted_songs_outlive_a_compaction_within_the_retention_time(path):
    shard, _ = write_log(path, [Append("vectors", list(range(10)), 1), Append("vectors", [0], 2)])
    narrow = ["song_id", "text_hash", "checksum"]
    paid = shard.all_rows().slice(1, 10).filter(pl.col("song_id") != 9).select(narrow).sort("song_id")
    shard.append_gone(range(5))
    assert not compact_if_worth_it(shard, retention_s=60.0), "one row of 16 is dead"
    assert compact_if_worth_it(put_again(path, 5), retention_s=60.0)
    shard = open_shard(path)
    assert shard.live_rows()["song_id"].to_list() == [5, 6, 7, 8, 9]
    kept = shard.find_sound(shard.all_rows().filter("has_vector", pl.col("song_id") != 9))
    assert kept.select(narrow).sort("song_id").equals(paid)
    assert shard.told_song_ids().sort().to_list() == list(range(10))
    assert not compact_if_worth_it(shard, retention_s=60.0)


@pytest.mark.parametrize("has_time", [True, False])
def test_after_the_retention_time_a_compaction_drops_them_whatever_was_written_since(path, monkeypatch, has_time):
    shard, _ = write_log(path, [Append("vectors", list(range(10)), 1)])
    now = time.time()
    if has_time:
        monkeypatch.setattr(time, "time", lambda: now - 100)
        shard.append_gone(range(5))
        monkeypatch.setattr(time, "time", lambda: now)
        put_again(path, 5)
    else:  # as tombstones were before they had a time: the file's counts
        shard.append(range(5), [bytes(16)] * 5, None, None)
        put_again(path, 5)
        os.utime(path, (now - 100, now - 100))
    assert compact_if_worth_it(open_shard(path), retention_s=200.0)
    assert open_shard(path).all_rows().height == 15
    put_again(path, 5)
    assert compact_if_worth_it(open_shard(path), retention_s=50.0)
    assert open_shard(path).all_rows()["song_id"].to_list() == [5, 6, 7, 8, 9]


def test_a_song_that_came_back_has_one_row_and_a_song_deleted_twice_one_vector(path):
    shard, _ = write_log(path, [Append("vectors", list(range(10)), 1)])
    shard.append_gone(range(5))
    Append("vectors", [0, 1], 9).apply(shard, {})
    shard.append_gone([1])
    assert compact_if_worth_it(put_again(path, 5), retention_s=60.0)
    shard = open_shard(path)
    assert shard.live_rows()["song_id"].to_list() == [0, *range(5, 10)]
    assert sorted(shard.all_rows().filter("has_vector")["song_id"].to_list()) == list(range(10))
    assert shard.all_rows().filter(~pl.col("has_vector"))["song_id"].to_list() == [1, 2, 3, 4]
