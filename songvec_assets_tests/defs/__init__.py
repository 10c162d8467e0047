"""Tests of the Dagster face, and of the commands as people type them."""
