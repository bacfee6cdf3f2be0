"""What `learn` is made of that needs no model. All of it together: `cycles/`."""

import pytest

from trainer.gate import JUDGE, Check, Verdict
from trainer.learning import BAR_LENGTH, NARROWINGS, bar, largest_passing


def verdict(*failed: str) -> Verdict:
    return Verdict([Check(name, 0.0, 0.0, name not in failed, "") for name in (JUDGE, "guard", "kl")])


@pytest.mark.parametrize(
    ("limit", "found"),
    [(1.0, 1.0), (0.99, 15 / 16), (0.7, 11 / 16), (0.5, 0.5), (1 / 16, 1 / 16), (0.06, None)],
)
def test_the_largest_share_that_passes_is_found_to_a_sixteenth(limit: float, found: float | None) -> None:
    tried: list[float] = []

    def show(share: float) -> Verdict:
        tried.append(share)
        return verdict() if share <= limit else verdict("guard")

    assert largest_passing(show) == found
    assert len(tried) == (1 if limit == 1.0 else 1 + NARROWINGS)


@pytest.mark.parametrize(
    ("least", "most", "found"), [(0.6, 0.8, 3 / 4), (0.5, 0.55, 1 / 2), (0.3, 0.2, None)]
)
def test_a_share_that_gains_too_little_is_not_made_smaller(
    least: float, most: float, found: float | None
) -> None:
    def show(share: float) -> Verdict:
        return verdict(*[JUDGE] * (share < least), *["kl"] * (share > most))

    assert largest_passing(show) == found


def test_where_all_of_it_gains_too_little_nothing_else_is_tried() -> None:
    tried: list[float] = []

    def show(share: float) -> Verdict:
        tried.append(share)
        return verdict(JUDGE)

    assert largest_passing(show) is None
    assert tried == [1.0]


def test_the_bar_is_empty_before_and_full_after() -> None:
    assert bar(0, 7) == "─" * BAR_LENGTH
    assert bar(7, 7) == "━" * BAR_LENGTH
    assert [bar(done, 30).count("━") for done in (1, 2, 15, 29)] == [0, 1, 7, 14]
