"""What `learn` is made of that needs no model. All of it together: `test_cycle.py`."""

import pytest

from trainer.learning import NARROWINGS, largest_passing


@pytest.mark.parametrize(
    ("limit", "found"),
    [(1.0, 1.0), (0.99, 15 / 16), (0.7, 11 / 16), (0.5, 0.5), (1 / 16, 1 / 16), (0.06, None)],
)
def test_the_largest_share_that_passes_is_found_to_a_sixteenth(limit: float, found: float | None) -> None:
    tried: list[float] = []

    def passes(share: float) -> bool:
        tried.append(share)
        return share <= limit

    assert largest_passing(passes) == found
    assert len(tried) == (1 if limit == 1.0 else 1 + NARROWINGS)
