"""Intervals of shares."""

import pytest

from service.intervals import wilson


def test_wilsons_interval() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert wilson(0, 0) == (0.0, 1.0)
