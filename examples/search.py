"""Search from Python: the nearest songs as a frame, and their vectors as a matrix. Run `songvec demo` first."""

import polars as pl

from songvec_assets import Pipeline

with Pipeline.from_env() as songs:
    hits = pl.DataFrame(songs.search("a storm at sea", limit=5))
    print(hits.select("song_id", "name", "artist", pl.col("similarity").round(3)))

    vectors = songs.embeddings(hits["song_id"])
    matrix = vectors["embedding"].to_numpy()  # float32, (songs, dimensions)
    print(f"{matrix.shape[0]} vectors of {matrix.shape[1]} values")
