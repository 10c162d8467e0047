"""Writes `songs.parquet` from `songs.txt`."""

from pathlib import Path

from songvec_assets.samples import write_sample_songs

write_sample_songs(Path(__file__).parent)
