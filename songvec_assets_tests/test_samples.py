"""The sample catalogue: what people read is what the demo loads."""

import unicodedata

import polars as pl

from songvec_assets.samples import parse_sample_songs, read_sample_queries, read_sample_songs, write_sample_songs
from songvec_assets.songs.text import TextSpec, render_texts

SCRIPTS = (
    "LATIN",
    "CYRILLIC",
    "GREEK",
    "ARABIC",
    "HEBREW",
    "DEVANAGARI",
    "HANGUL",
    "HIRAGANA",
    "KATAKANA",
    "CJK",
    "THAI",
)


def test_the_parquet_file_is_the_parsed_text():
    """If not: python -m songvec_assets.samples."""
    assert read_sample_songs().equals(parse_sample_songs())


def test_the_columns_are_those_of_a_songs_table():
    assert read_sample_songs().schema == {"name": pl.String, "artist": pl.String, "lyrics": pl.String}


def test_what_is_written_is_read_back(tmp_path):
    write_sample_songs(tmp_path)
    assert pl.read_parquet(tmp_path / "songs.parquet").equals(read_sample_songs())


def test_there_are_at_least_150_songs_and_no_two_are_the_same():
    songs = read_sample_songs()
    assert songs.height >= 150
    assert songs.select("name", "artist").is_duplicated().sum() == 0
    texts = render_texts(songs.with_row_index("song_id"), TextSpec())
    assert texts["text_hash"].n_unique() == songs.height


def test_every_song_has_a_name_and_an_artist_and_only_some_have_no_lyrics():
    songs = read_sample_songs()
    for column in ("name", "artist"):
        assert songs[column].null_count() == 0
        assert (songs[column].str.strip_chars() == songs[column]).all()
        assert (songs[column].str.len_chars() > 0).all()
    assert 0 < songs["lyrics"].null_count() < songs.height / 4
    assert (songs["lyrics"].drop_nulls().str.strip_chars().str.len_chars() > 0).all()


def test_lyrics_are_written_in_several_scripts():
    songs = read_sample_songs()
    scripts = {
        script: sum(1 for lyrics in songs["lyrics"].drop_nulls() if _is_mostly(lyrics, script)) for script in SCRIPTS
    }
    assert sum(n_songs > 0 for n_songs in scripts.values()) >= 5, scripts


def test_the_labelled_queries_name_songs_of_the_catalogue_once_and_each_slice_has_enough():
    rows = read_sample_queries()
    assert rows.columns == ["slice", "query", "song", "grade"]
    assert set(rows["grade"]) == {1, 2}
    assert not rows.select("slice", "query", "song").is_duplicated().any()
    assert set(rows["song"]) <= set(read_sample_songs()["name"])
    sizes = dict(rows.group_by("slice").agg(pl.col("query").n_unique()).iter_rows())
    assert sizes.keys() == {"themes", "languages", "keywords", "titles", "typos"}
    assert min(sizes.values()) >= 15


def _is_mostly(lyrics, script):
    letters = [character for character in lyrics if character.isalpha()]
    of_script = sum(unicodedata.name(letter, "").startswith(script) for letter in letters)
    return of_script > len(letters) / 3
