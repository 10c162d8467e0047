"""Fixtures of the table's room, for searches."""

from songvec_assets_tests.vectors.conftest import cache

__all__ = ["cache"]
