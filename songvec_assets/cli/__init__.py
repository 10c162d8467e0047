"""`songvec`: the graph and its questions from a terminal.

When to add here: another module of commands, so that it is imported. Keep out: the commands.
"""

from songvec_assets.cli import commands, queries, serving, store
from songvec_assets.cli.base import app, main

__all__ = ["app", "commands", "main", "queries", "serving", "store"]
