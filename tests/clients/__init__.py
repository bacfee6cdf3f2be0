"""Real clients against the service. A package, so that its conftest.py is not mistaken for that of tests/service."""
