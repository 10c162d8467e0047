"""The pgvector table: load, index, search."""
