"""Tests of whole cycles, on a real PostgreSQL with a tiny model."""
