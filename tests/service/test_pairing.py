"""When two replies are shown, in which order, and when they are worth a vote."""

from collections import Counter
from random import Random

import pytest

from service.pairing import Pairing, Rates, alike, draw, objection, pair, shown_order, words

TWO = Rates(base=0.25, evaluation=0.1)


def test_each_draw_is_won_at_its_rate() -> None:
    chance = Random(1)
    drawn = Counter(draw(TWO, chance) for _ in range(20_000))
    assert abs(drawn["evaluation"] - 2000) < 200
    assert abs(drawn["auto"] - 0.9 * 0.25 * 20_000) < 250
    assert draw(Rates(0.0, 0.0), chance) is None


@pytest.mark.parametrize("capped", [False, True])
def test_the_propensity_is_the_share_that_is_shown(capped: bool) -> None:
    chance = Random(2)
    shown = [
        pairing
        for _ in range(20_000)
        if (won := draw(TWO, chance)) and (pairing := pair(won, TWO, opted_out=False, capped=capped))
    ]
    assert {round(pairing.propensity, 9) for pairing in shown} == {0.1 if capped else 0.325}
    assert abs(len(shown) / 20_000 - shown[0].propensity) < 0.01


def test_the_cap_spares_the_evaluation_slice_and_opting_out_nothing() -> None:
    assert pair("auto", TWO, opted_out=False, capped=True) is None
    assert pair("evaluation", TWO, opted_out=False, capped=True) == Pairing("evaluation", 0.1)
    assert pair("evaluation", TWO, opted_out=True, capped=False) is None


def test_each_order_is_as_likely() -> None:
    chance = Random(2)
    orders = Counter(tuple(shown_order(2, chance)) for _ in range(10_000))
    assert set(orders) == {(0, 1), (1, 0)}
    assert abs(orders[0, 1] - 5000) < 200


@pytest.mark.parametrize(
    ("replies", "code"),
    [
        ([("a", "stop"), ("b", "stop")], None),
        ([("a", "stop"), (None, None)], "comparison_running"),
        ([("a", "stop"), ("b", "abort")], "comparison_failed"),
        ([("a", "error"), ("b", "length")], "comparison_failed"),
        ([("a", "stop"), ("b", "length")], "comparison_cut_off"),
        ([("It is yellow.", "stop"), ("it is  yellow", "stop")], "replies_alike"),
        ([("...", "stop"), ("!", "stop")], None),
        ([("a", "stop"), ("a", "stop"), ("b", "stop")], None),
        ([("a", "stop"), ("a", "stop"), ("A.", "stop")], "replies_alike"),
    ],
)
def test_replies_that_are_not_worth_a_vote(
    replies: list[tuple[str | None, str | None]], code: str | None
) -> None:
    against = objection(replies)
    assert (against.code if against else None) == code


def test_one_word_in_forty_is_nearly_the_same_and_one_in_four_is_not() -> None:
    long = [f"word{i}" for i in range(40)]
    assert alike(long, [*long[:20], "other", *long[21:]])
    assert not alike(words("A lemon is yellow."), words("A lemon is green."))
    assert not alike(long, list(reversed(long)))
