"""Tests of how texts become vectors."""
