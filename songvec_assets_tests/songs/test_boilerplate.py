"""What is no lyric is found, and lyrics are not."""

from songvec_assets.samples import read_sample_songs
from songvec_assets.songs.boilerplate import find_boilerplate


def test_the_samples_and_texts_like_it_are_lyrics() -> None:
    lyrics = read_sample_songs()["lyrics"].drop_nulls().to_list()
    lyrics += ["[Verse 1]\nI embed my heart\n[Chorus]\nyou might also like me", "an instrumental night at 12:30"]
    found = find_boilerplate(lyrics, 100)
    assert (found.n_found, found.is_common) == (0, False), found
