"""Tests of the Dagster face."""
