"""Tests that the pages of the documentation say what the package does."""
