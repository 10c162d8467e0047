"""`songvec`: a thin face over the same graph and core."""

from songvec_assets.cli import commands, queries
from songvec_assets.cli.base import app, main

__all__ = ["app", "commands", "main", "queries"]
