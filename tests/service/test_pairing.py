"""When two replies are shown, and in which order."""

from collections import Counter
from random import Random

import pytest

from service.pairing import Pairing, decide, shown_order


def test_never_is_never_and_always_always() -> None:
    assert decide("never", 1.0, Random(0)) is None
    assert decide("always", 0.0, Random(0)) == Pairing("always", 1.0)


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.25, 2300, 2700), (1.0, 10_000, 10_000)])
def test_auto_is_shown_at_its_rate_and_says_so(rate: float, low: int, high: int) -> None:
    chance = Random(1)
    shown = [pairing for _ in range(10_000) if (pairing := decide("auto", rate, chance))]
    assert low <= len(shown) <= high
    assert all(pairing == Pairing("auto", rate) for pairing in shown)


def test_each_order_is_as_likely() -> None:
    chance = Random(2)
    orders = Counter(tuple(shown_order(2, chance)) for _ in range(10_000))
    assert set(orders) == {(0, 1), (1, 0)}
    assert abs(orders[0, 1] - 5000) < 200
