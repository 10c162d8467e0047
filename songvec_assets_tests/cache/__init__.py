"""Tests of what is already paid for."""
