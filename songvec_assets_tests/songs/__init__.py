"""Tests of what a song is."""
