"""Songs in Postgres become an indexed pgvector table of embeddings, as a Dagster asset graph."""
