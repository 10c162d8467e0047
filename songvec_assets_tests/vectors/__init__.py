"""Tests of the pgvector table."""
