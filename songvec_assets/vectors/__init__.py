"""The pgvector tables: loads, swaps, the ledger, the index."""
