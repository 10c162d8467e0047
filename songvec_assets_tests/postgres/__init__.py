"""Tests of how the database is reached."""
