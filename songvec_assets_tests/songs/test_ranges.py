"""Ranges of song_ids: keys that round-trip and sort, tilings that hold every song_id exactly once."""

import re
from bisect import bisect_right

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from songvec_assets.errors import SettingsError
from songvec_assets.songs.ranges import MAX_SONG_ID, SongIdRange, Tiling, parse_span

PROFILE = settings(deadline=None)


@st.composite
def ranges(draw, highest=MAX_SONG_ID + 1):
    """Any range up to `highest`, the open tail often among them."""
    start = draw(st.integers(0, highest - 1))
    return SongIdRange(start, draw(st.integers(start + 1, highest) | st.just(MAX_SONG_ID + 1)))


@st.composite
def tilings(draw):
    """Tilings of up to 40 ranges below the tail, of any width."""
    n_ranges = draw(st.integers(1, 40))
    width = draw(st.integers(1, 999_999_999 // n_ranges))
    return Tiling(width, width * n_ranges, width * draw(st.integers(0, n_ranges - 1)))


@PROFILE
@given(ranges())
def test_a_key_names_its_range_and_no_other(song_range):
    assert SongIdRange.from_key(song_range.key) == song_range


def test_a_span_is_two_ranges_of_the_tiling_in_order_or_one():
    tiling = Tiling(100, 300)
    first, second, tail = SongIdRange(0, 100), SongIdRange(100, 200), tiling.tail
    assert parse_span(f"{first.key} ... {tail.key}", tiling) == (first, tail)
    assert parse_span(second.key, tiling) == (second, second)
    for words in ("", "x", f"{second.key}...{first.key}", f"{first.key}...{SongIdRange(100, 300).key}"):
        with pytest.raises(SettingsError, match=r"FIRST\.\.\.LAST") as refused:
            parse_span(words, tiling)
        assert refused.value.code == "settings.ranges"


def test_keys_look_as_documented():
    assert SongIdRange(50_000, 100_000).key == "000050000-000100000"
    assert SongIdRange(16_000_000, MAX_SONG_ID + 1).key == "016000000-max"
    assert SongIdRange.from_key("016000000-max").is_tail
    assert not SongIdRange(0, MAX_SONG_ID).is_tail


@PROFILE
@given(ranges(highest=999_999_999), ranges(highest=999_999_999))
def test_keys_sort_as_the_ranges_do(one, other):
    assert (one.key < other.key) == (one < other)


@pytest.mark.parametrize("stop", [1_000_000_000, 2_147_000_000])
def test_keys_beyond_nine_digits_grow_and_their_ranges_sort(stop):
    tiles = list(Tiling(1_000_000, stop))
    assert tiles == sorted(tiles) == [SongIdRange.from_key(tile.key) for tile in tiles]
    assert tiles[0].key == "000000000-001000000"
    assert tiles[-1].key == f"{stop}-max"


@pytest.mark.parametrize("width", [1, 50_000, 65_536, 1_000_000])
def test_the_highest_stop_leaves_a_tail_whatever_the_width(width):
    tiling = Tiling(width, MAX_SONG_ID + 1, start=MAX_SONG_ID // width * width - 2 * width)
    assert len(list(tiling)) == len(tiling) == 3
    assert tiling.tail.stop - tiling.tail.start <= width


@pytest.mark.parametrize(
    ("start", "words"), [(50, "SONGVEC_SONG_ID_START must be a multiple"), (1_000, "below"), (-100, "0")]
)
def test_a_start_within_a_range_or_beyond_the_stop_is_refused(start, words):
    with pytest.raises(SettingsError, match=words):
        Tiling(100, 1_000, start)


@PROFILE
@given(st.integers(1, 1_000_000), st.integers(1, MAX_SONG_ID // 1_000_000), st.integers(0, 2_000))
def test_too_many_ranges_are_refused_with_a_cut_that_fits(width, n_ranges, n_before):
    n_ranges = min(n_ranges, MAX_SONG_ID // width)
    tiling = Tiling(width, width * n_ranges, width * min(n_before, n_ranges - 1))
    assert len(tiling) <= 5_001
    tiling.check_count()
    many = Tiling(1, MAX_SONG_ID - n_before, n_before * width % 1_000_000)
    with pytest.raises(SettingsError, match="more than 5,000") as refused:
        many.check_count()
    width, start, stop = (int(number) for number in re.findall(r"=(\d+)", str(refused.value)))
    advised = Tiling(width, stop, start)
    advised.check_count()
    assert width <= 1_000_000
    assert advised.start <= many.start
    assert advised.stop >= many.stop - width or advised.stop >= many.stop


NO_KEYS = ["", "-", "000000000", "000000000-", "-000000100", "a-b", "000000000-MAX", "max-max", "000000100-000000000"]
NO_KEYS += ["000000000-000000000", "000000000-000000100-000000200", "-00000001-000000100", "٠٠٠٠٠٠٠٠٠-٠٠٠٠٠٠١٠٠"]
NO_KEYS += [" 000000000-000000100", "000000000-000000100\n", "000000000-0000_0100", "000000000-9999999999", "9" * 5000]


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match="expected"):
        SongIdRange.from_key(key)


@PROFILE
@given(st.from_regex(r"[0-9]{1,11}-([0-9]{1,11}|max)", fullmatch=True))
@example("0-100")
@example("000000000-2147483648")
def test_a_range_has_one_key_only(key):
    """Two spellings would be two files of one range."""
    try:
        song_range = SongIdRange.from_key(key)
    except ValueError:
        return
    assert song_range.key == key


@PROFILE
@given(ranges(), st.integers(-2, MAX_SONG_ID + 2))
def test_a_range_holds_its_start_and_not_its_stop(song_range, song_id):
    assert song_range.start in song_range
    assert song_range.stop - 1 in song_range
    assert song_range.stop not in song_range
    assert song_range.start - 1 not in song_range
    assert (song_id in song_range) == (song_id in range(song_range.start, song_range.stop))


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (6, 5), (0, 0), (0, MAX_SONG_ID + 2)])
def test_an_empty_a_negative_and_a_too_high_range_are_refused(start, stop):
    with pytest.raises(ValueError, match=rf"\[{start}, {stop}\)"):
        SongIdRange(start, stop)


@PROFILE
@given(tilings())
def test_a_tiling_covers_every_song_id_exactly_once(tiling):
    tiles = list(tiling)
    assert [tile.start for tile in tiles] == [tiling.start, *(tile.stop for tile in tiles[:-1])]
    assert tiles[-1].stop == MAX_SONG_ID + 1
    assert tiles[-1] == tiling.tail
    assert tiles[-1].start == tiling.stop
    assert all(tile.stop - tile.start == tiling.width for tile in tiles[:-1])
    assert len(tiling) == len(tiles)
    assert all(tile in tiling for tile in tiles)


@pytest.mark.parametrize("key", ["000000000-000000100", "000000200-000000250", "000000100-000000300", "000000400-max"])
def test_ranges_below_the_start_of_another_width_or_of_another_stop_are_in_no_tiling(key):
    assert SongIdRange.from_key(key) not in Tiling(100, 500, 100)


@PROFILE
@given(tilings(), st.data())
def test_range_of_finds_the_tile_that_holds_a_song_id(tiling, data):
    tiles = list(tiling)
    edges = [tile.start for tile in tiles] + [tile.stop - 1 for tile in tiles]
    song_id = data.draw(st.integers(tiling.start, MAX_SONG_ID) | st.sampled_from(edges))
    assert tiling.range_of(song_id) == tiles[bisect_right([tile.start for tile in tiles], song_id) - 1]
    assert song_id in tiling.range_of(song_id)


def test_the_default_tiling_is_320_ranges_and_the_tail():
    assert len(Tiling(50_000, 16_000_000)) == 321


@pytest.mark.parametrize(("width", "stop"), [(0, 100), (-1, 100), (100, 0), (100, -100)])
def test_a_tiling_without_ranges_is_refused(width, stop):
    with pytest.raises(SettingsError, match=f"got {width} and {stop}"):
        Tiling(width, stop)


def test_the_tail_may_hold_as_many_songs_as_a_range():
    tiling = Tiling(100, 1_000)
    tiling.check_tail(tiling.tail, 100)
    tiling.check_tail(SongIdRange(0, 100), 101)
    with pytest.raises(SettingsError, match=r"from song_id 1000 on holds 1,001 songs.* 100 .*SONGVEC_SONG_ID_STOP"):
        tiling.check_tail(tiling.tail, 1_001)


def test_a_stop_that_no_range_ends_at_is_refused_by_the_names_of_both_settings():
    with pytest.raises(SettingsError, match=r"SONGVEC_SONG_ID_STOP .* SONGVEC_RANGE_SIZE: 1050 .* 100"):
        Tiling(100, 1050)
