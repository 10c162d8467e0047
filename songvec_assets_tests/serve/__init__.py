"""Tests of the HTTP door: real servers, on loopback."""
