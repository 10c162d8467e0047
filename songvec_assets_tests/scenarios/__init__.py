"""Scenarios that cross rooms: other people's servers and databases, kills, prompts, missing songs, partial runs."""
