"""Tests of `deploy/`: its files are what they should be, and the services of its compose file work together."""
