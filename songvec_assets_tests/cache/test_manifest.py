"""The manifest of a range: which files hold, what is recorded of songs, and what is refused."""

import polars as pl
import pytest
from msgspec.structs import replace

from songvec_assets.cache import manifest as manifests
from songvec_assets.cache.manifest import Completion, DataFile, Manifest, Rejection
from songvec_assets.cache.parts import PartIdentity
from songvec_assets.cache.plan import FillReport
from songvec_assets.errors import (
    StoreError,
)
from songvec_assets_tests.cache.filling import FIRST, Run, Songs, fill, plain_songs
from songvec_assets_tests.provider import Provider


@pytest.mark.parametrize("content", ["", "5", "{}", '{"counts": [1]}', "\x00", '{"version": 1, "files": 3}', "flip"])
def test_a_manifest_that_does_not_parse_is_named_and_costs_no_request(
    songs: Songs, run: Run, provider: Provider, content: str
) -> None:
    songs(*plain_songs(range(1, 9)))
    first = run()
    fill(first)
    path = first.cache.storage.root / FIRST.key / "manifest.json"
    good = path.read_text()
    flipped = good.replace('"n_songs":8', '"n_songs":9')
    assert flipped != good
    path.write_text(flipped if content == "flip" else content)
    provider.reset_ledger()
    reports: list[FillReport] = []
    run().filler().fill_ranges([FIRST], reports.append)
    assert str(path) in str(reports[0].error)
    assert "does not parse" in str(reports[0].error)
    path.unlink()
    (report,) = fill(run())
    assert report.n_unchanged == 8
    assert provider.ledger()["requests"] == 0
    assert path.read_text() == good


def test_a_manifest_of_another_version_is_refused_by_its_name(songs: Songs, run: Run) -> None:
    songs(*plain_songs(range(1, 9)))
    first = run()
    fill(first)
    path = first.cache.storage.root / FIRST.key / "manifest.json"
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    reports: list[FillReport] = []
    run().filler().fill_ranges([FIRST], reports.append)
    assert type(reports[0].error) is StoreError
    assert "has version 2, expected 1" in str(reports[0].error)


IDENTITY = PartIdentity("m", 3, FIRST)
WRITER, OTHER = "a" * 32, "b" * 32


def part(number: int, writer: str = WRITER, generation: int = 2) -> str:
    return f"{generation}-{writer}-{number}.arrow"


def base(writer: str = WRITER, generation: int = 2) -> str:
    return f"{generation}-{writer}-base.arrow"


FULL = Manifest(
    generation=2,
    files=(DataFile(base(), 100), DataFile(part(1), 10)),
    rejected=(Rejection(1, b"h", "refused"), Rejection(2, b"i", "refused")),
    deleted_at={3: 5.0},
    damaged=(4,),
    consumed=(part(0),),
    complete=Completion("snapshot", "text", 9, 2, 0, "server", 5, b"digest"),
)


def test_it_is_read_as_it_was_written_with_its_identity() -> None:
    found = manifests.decode(manifests.encode(FULL, IDENTITY), "manifest.json", IDENTITY)
    assert found.identity == IDENTITY
    assert replace(found, model_id="", dimensions=0, range="") == FULL
    assert manifests.key_of(FIRST) == "000000000-000000100/manifest.json"


def test_any_flipped_bit_is_found_and_another_identity_refused() -> None:
    content = manifests.encode(FULL, IDENTITY)
    for position in range(len(content) - 1):
        flipped = bytearray(content)
        flipped[position] ^= 1
        with pytest.raises(StoreError):
            manifests.decode(bytes(flipped), "manifest.json", IDENTITY)
    with pytest.raises(StoreError, match="expected") as refused:
        manifests.decode(content, "manifest.json", PartIdentity("m", 4, FIRST))
    assert refused.value.code == "store.foreign-file"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "store.damaged"),
        (b"{}", "store.damaged"),
        (b'{"version":2}\nx', "store.other-version"),
        (b'{"version":1}\n0000000000000000', "store.damaged"),
    ],
)
def test_what_is_no_manifest_of_this_version_is_refused_with_a_way_out(content: bytes, code: str) -> None:
    with pytest.raises(StoreError) as refused:
        manifests.decode(content, "manifest.json")
    assert refused.value.code == code


def test_newer_parts_of_its_generation_are_adopted_in_their_order_and_nothing_else_is() -> None:
    names = [part(10, OTHER), part(9, OTHER), part(2), part(1), part(0), part(0, generation=3), base(OTHER), "mine.txt"]
    assert FULL.find_unnamed(names) == [part(2), part(9, OTHER), part(10, OTHER)]
    assert FULL.find_unnamed(names, is_read=False)[0] == base(OTHER), "of a lost manifest the bases count too"


def test_the_last_word_on_a_song_replaces_the_others() -> None:
    adopted = FULL.adopt([DataFile(part(2), 7)], [1, 3, 4])
    assert [each.song_id for each in adopted.rejected] == [2]
    assert (adopted.deleted_at, adopted.damaged, adopted.complete) == ({}, (), None)
    assert [each.name for each in adopted.files] == [base(), part(1), part(2)]
    rejected = FULL.reject([Rejection(3, b"h", "again"), Rejection(4, b"h", "again")])
    assert [each.song_id for each in rejected.rejected] == [1, 2, 3, 4]
    assert (rejected.deleted_at, rejected.damaged) == ({}, ())
    deleted = FULL.delete([1, 4], at=8.0)
    assert ([each.song_id for each in deleted.rejected], deleted.deleted_at) == ([2], {1: 8.0, 3: 5.0, 4: 8.0})
    assert FULL.adopt([], [1]) is FULL.reject([]) is FULL, "nothing new leaves it complete"


def test_garbage_is_what_is_older_or_merged_or_of_a_merge_that_never_ended() -> None:
    names = [base(), part(1), part(0), part(2), base(OTHER), part(5, generation=1), part(0, generation=3), "mine.txt"]
    assert sorted(FULL.find_garbage(names)) == sorted([part(0), base(OTHER), part(5, generation=1)])


def test_a_later_generation_begins_without_files_and_keeps_what_is_known_of_songs() -> None:
    later = FULL.begin_generation(7)
    assert (later.generation, later.files, later.consumed, later.damaged, later.complete) == (7, (), (), (), None)
    assert (later.rejected, later.deleted_at) == (FULL.rejected, FULL.deleted_at)


@pytest.mark.parametrize(
    ("rejected_by", "asked", "fits"),
    [
        ("server", ("snapshot", "text", "server"), True),
        ("server", ("snapshot", "text", "another"), False),
        ("", ("snapshot", "text", "another"), True),
        ("", ("another", "text", "server"), False),
        ("", ("snapshot", "another", "server"), False),
        ("", ("", "text", "server"), False),
    ],
)
def test_a_complete_range_stays_so_for_the_same_songs_texts_and_server(
    rejected_by: str, asked: tuple[str, str, str], fits: bool
) -> None:
    assert FULL.complete
    assert replace(FULL.complete, server=rejected_by).fits(*asked) == fits


def test_a_digest_depends_on_songs_and_checksums() -> None:
    rows = pl.DataFrame({"song_id": [1, 2], "checksum": [7, 8]}, schema={"song_id": pl.Int32, "checksum": pl.UInt64})
    others = [rows.head(1), rows.with_columns(pl.col("song_id") + 1), rows.with_columns(pl.col("checksum") + 1)]
    assert len({manifests.digest_rows(each) for each in (rows, *others)}) == 4
    assert manifests.digest_rows(rows) == manifests.digest_rows(rows.clone())
