"""The text that is embedded and its identity."""

import unicodedata

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.errors import SettingsError
from songvec_assets.songs.text import TEXT_HASH_BYTES, TextSpec, hash_text, render_texts

DEFAULT = TextSpec()
PROFILE = settings(deadline=None, max_examples=60)
SPACE = " \n\t\u00a0\u2003\u3000"
FRAGMENTS = st.text(st.sampled_from("ab{}é" + "e\u0301" + "가ᄀ" + "ᅡ日🎵'\"\\%" + SPACE), max_size=12)
SONGS = st.lists(st.tuples(FRAGMENTS, FRAGMENTS, st.none() | FRAGMENTS), min_size=1, max_size=6)


def frame(songs):
    """Songs numbered from 100 downwards: an order that sorting would change."""
    rows = [(100 - place, *song) for place, song in enumerate(songs)]
    schema = {"song_id": pl.Int32, "name": pl.String, "artist": pl.String, "lyrics": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def render(songs, spec=DEFAULT):
    return render_texts(frame(songs), spec)


@PROFILE
@given(SONGS)
def test_a_text_is_the_template_with_the_songs_fields_in_nfc_and_without_white_space_around(songs):
    texts = render(songs)
    expected = [
        unicodedata.normalize("NFC", f"{name} by {artist}\n{lyrics or ''}").strip() for name, artist, lyrics in songs
    ]
    assert texts["text"].to_list() == expected
    assert texts["song_id"].to_list() == [100 - place for place in range(len(songs))]
    assert not texts["truncated"].any()


@PROFILE
@given(SONGS, st.integers(1, 20))
def test_a_longer_text_is_cut_to_its_first_characters_and_marked(songs, max_chars):
    whole, cut = render(songs), render(songs, TextSpec(max_chars=max_chars))
    for before, after, truncated in zip(whole["text"], cut["text"], cut["truncated"], strict=True):
        assert after.rstrip() == before[:max_chars].rstrip()
        assert len(after) <= max_chars
        assert truncated == (len(before) > max_chars)


@PROFILE
@given(SONGS, st.integers(1, 20))
def test_no_text_ends_in_white_space_even_where_it_is_cut(songs, max_chars):
    texts = render(songs, TextSpec(max_chars=max_chars))["text"].to_list()
    assert texts == [text.strip() for text in texts]


@PROFILE
@given(SONGS, st.integers(1, 40))
def test_the_hash_is_of_the_text_as_it_is_sent(songs, max_chars):
    texts = render(songs, TextSpec(max_chars=max_chars))
    assert texts["text_hash"].to_list() == [hash_text(text) for text in texts["text"]]


@PROFILE
@given(FRAGMENTS, FRAGMENTS, st.none() | FRAGMENTS)
def test_one_song_and_many_render_the_same(name, artist, lyrics):
    spec = TextSpec("{lyrics}|{name}", 9)
    alone, _ = render([(name, artist, lyrics), ("x", "y", "z")], spec)["text"]
    assert alone == render([("x", "y", "z"), (name, artist, lyrics)], spec)["text"][1]


def test_composed_and_decomposed_letters_have_one_identity():
    texts = render([("Café", "Ann", "é"), ("Cafe\u0301", "Ann", "e\u0301")])
    assert texts["text_hash"].n_unique() == 1


def test_a_song_without_lyrics_is_its_name_and_artist():
    assert render([("Hill", "Ben", None), ("Hill", "Ben", "")])["text"].to_list() == ["Hill by Ben"] * 2


def test_a_missing_name_and_artist_leave_the_lyrics():
    assert render([(None, None, "la")])["text"].to_list() == ["by \nla"]


def test_no_songs_are_no_texts_of_the_same_columns():
    texts = render_texts(frame([]), TextSpec())
    assert texts.schema == {
        "song_id": pl.Int32,
        "text": pl.String,
        "text_hash": pl.Binary,
        "truncated": pl.Boolean,
    }


def test_a_hash_is_16_bytes_that_never_change():
    """What is cached is found by it: another hash would pay for every song again."""
    assert hash_text("Sea by Ann\nwaves").hex() == "932139bb62c19cbafaa0d94754d3ae41"
    assert len(hash_text("")) == TEXT_HASH_BYTES == 16


def test_another_template_is_another_text():
    spec = TextSpec("{artist}: {{{lyrics}}} {artist}")
    assert render([("Sea", "Ann", "waves")], spec)["text"].to_list() == ["Ann: {waves} Ann"]


@pytest.mark.parametrize(
    "template",
    [
        "",
        "no field",
        "{title}",
        "{}",
        "{0}",
        "{name",
        "name}",
        "{name.upper}",
        "{name[0]}",
        "{{name}}",
        "{name} {album}",
    ],
)
def test_a_template_of_other_fields_is_refused_by_its_setting(template):
    with pytest.raises(SettingsError, match="SONGVEC_TEXT_TEMPLATE") as refusal:
        TextSpec(template)
    assert repr(template) in str(refusal.value)


@pytest.mark.parametrize("template", ["{name!r}", "{lyrics:.1000}", "{name:>20} {lyrics}", "{name:{artist}}"])
def test_a_template_that_formats_its_fields_is_refused_rather_than_half_obeyed(template):
    with pytest.raises(SettingsError, match="SONGVEC_TEXT_TEMPLATE"):
        TextSpec(template)
