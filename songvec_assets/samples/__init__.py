"""The sample catalogue: songs written for this project, as `songs.txt` for people and `songs.parquet` for the demo.

`python -m songvec_assets.samples` writes the second from the first. `queries.tsv` has labelled queries, by slice, with
the songs that answer them. Grade 2: the song is about it; grade 1: in part; songs that are not listed are not.

- `themes` (English), `languages` (14 others): three in four share no word with any of their songs. The grades were
  given from the lyrics alone, before any ranking was seen (November 2026).
- `keywords`: themes in a word or two, which titles may have; graded as the theme queries that ask for the same.
- `titles`, `typos`: names of songs drawn at random, half of them in lower case; one letter of a typo is swapped,
  dropped, doubled or replaced, or a name has lost its accents.
"""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where songs are read: a search of a filled database reads none
    import polars as pl

_FOLDER: Traversable = resources.files("songvec_assets.samples")


def read_sample_songs() -> "pl.DataFrame":
    """The sample catalogue: columns name, artist, lyrics (null for instrumentals)."""
    import polars as pl

    with resources.as_file(_FOLDER / "songs.parquet") as path:
        return pl.read_parquet(path)


def read_sample_queries() -> "pl.DataFrame":
    """Labelled queries, a row per query and song: columns slice, query, song (its name), grade."""
    import polars as pl

    content = (_FOLDER / "queries.tsv").read_bytes()
    return pl.read_csv(content, separator="\t", quote_char=None)


def parse_sample_songs() -> "pl.DataFrame":
    """The same songs, from their readable source: `Title — Artist`, lyrics below, a blank line between songs."""
    import polars as pl

    songs = []
    for song in (_FOLDER / "songs.txt").read_text(encoding="utf-8").strip().split("\n\n"):
        head, _, lyrics = song.partition("\n")
        name, _, artist = head.partition(" — ")
        songs.append((name, artist, lyrics or None))
    return pl.DataFrame(songs, schema={"name": pl.String, "artist": pl.String, "lyrics": pl.String}, orient="row")


def write_sample_songs(folder: Path) -> None:
    """Write `songs.parquet` from `songs.txt`."""
    parse_sample_songs().write_parquet(folder / "songs.parquet", compression="zstd", statistics=False)
