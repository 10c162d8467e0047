"""What a song is: its range, its text, its snapshot in Parquet."""
