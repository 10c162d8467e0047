"""Tests: they mirror the tree of songvec_assets; `provider` is a real HTTP server in its own process."""
