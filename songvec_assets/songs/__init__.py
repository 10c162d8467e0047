"""Songs: the source table, ranges of song_ids, snapshots in Parquet, and the texts to embed."""
