"""The sample catalogue: songs written for this project, as `songs.txt` for people and `songs.parquet` for the demo.

`python -m songvec_assets.samples` writes the second from the first.
"""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import polars as pl

_FOLDER: Traversable = resources.files("songvec_assets.samples")


def read_sample_songs() -> pl.DataFrame:
    """The sample catalogue: columns name, artist, lyrics (null for instrumentals)."""
    with resources.as_file(_FOLDER / "songs.parquet") as path:
        return pl.read_parquet(path)


def parse_sample_songs() -> pl.DataFrame:
    """The same songs, from their readable source: `Title — Artist`, lyrics below, a blank line between songs."""
    songs = []
    for song in (_FOLDER / "songs.txt").read_text(encoding="utf-8").strip().split("\n\n"):
        head, _, lyrics = song.partition("\n")
        name, _, artist = head.partition(" — ")
        songs.append((name, artist, lyrics or None))
    return pl.DataFrame(songs, schema={"name": pl.String, "artist": pl.String, "lyrics": pl.String}, orient="row")


def write_sample_songs(folder: Path) -> None:
    """Write `songs.parquet` from `songs.txt`."""
    parse_sample_songs().write_parquet(folder / "songs.parquet", compression="zstd", statistics=False)
