"""Embedding texts: the provider's client, its quota and price, and the local models."""
