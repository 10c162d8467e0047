"""Tests of the `songvec` command."""
