"""Measurements that the documentation quotes; each module says what it measures and how to repeat it."""
