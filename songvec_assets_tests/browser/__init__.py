"""Dagster's UI as a person uses it: a real browser, a real `dagster dev`, and a provider that keeps a ledger."""
