"""`songvec`: a thin face over the same graph and core."""

from songvec_assets.cli.commands import app, main

__all__ = ["app", "main"]
