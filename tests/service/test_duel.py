"""The duel's mathematics: exact where sums over all votes can be made, by hand where a line suffices."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import duel
from service.duel import Interval, Rules, Tally, decide, find_interval, log_evidence

RULES = Rules(most_votes=2000)
COUNTS = st.integers(0, 2000)


def evidence(wins: int, losses: int) -> float:
    return math.exp(log_evidence(wins, losses))


def test_evidence_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evidence(0, 0) == pytest.approx(1)
    # The leads are a geometric series: .04 (1.2^11 - 1) / .2 / 11 = .11692 on average, and one vote is worth twice that.
    assert evidence(1, 0) == pytest.approx(1.23383, abs=1e-4)
    assert evidence(0, 1) == pytest.approx(0.76617, abs=1e-4)
    monkeypatch.setattr(duel, "BETS", (0.6, 0.7))
    # 1.2 * 1.2 * 0.8 = 1.152 and 1.4 * 1.4 * 0.6 = 1.176
    assert evidence(2, 1) == pytest.approx((1.152 + 1.176) / 2)


def test_twelve_wins_in_a_row_decide_and_eleven_do_not() -> None:
    # By the largest bet alone 1.495^8 = 25 would; the mixture pays for not knowing how much better the challenger is.
    assert decide(Tally(11, 0, 0), RULES).outcome is None
    assert decide(Tally(12, 0, 0), RULES).outcome == "better"
    assert decide(Tally(0, 12, 0), RULES).outcome == "worse"


def test_a_stricter_rule_asks_for_more() -> None:
    tally = Tally(12, 0, 0)
    assert decide(tally, replace(RULES, alpha_promote=0.01)).outcome is None
    assert decide(tally, replace(RULES, alpha_reject=0.01)).outcome == "better"


def test_ties_count_towards_the_most_votes_and_evidence_comes_first() -> None:
    rules = Rules(most_votes=20)
    assert decide(Tally(5, 5, 9), rules).outcome is None
    assert decide(Tally(5, 5, 10), rules).outcome == "undecided"
    assert decide(Tally(12, 0, 8), rules).outcome == "better"


def test_a_tie_is_half_a_win_of_the_rate() -> None:
    assert decide(Tally(3, 1, 4), RULES).win_rate == pytest.approx(5 / 8)
    nothing = decide(Tally(0, 0, 0), RULES)
    assert (nothing.outcome, nothing.win_rate, nothing.interval) == (None, None, Interval(0.0, 1.0))


def test_evidence_beyond_what_a_float_holds_still_decides() -> None:
    verdict = decide(Tally(5000, 0, 0), RULES)
    assert verdict.outcome == "better"
    assert math.isfinite(verdict.evidence_better)
    assert verdict.evidence_worse < 1e-80


@pytest.mark.parametrize(
    ("most_votes", "alpha_promote", "alpha_reject"), [(0, 0.05, 0.05), (1, 0.0, 0.05), (1, 0.05, 0.5)]
)
def test_rules_that_promise_nothing_are_refused(
    most_votes: int, alpha_promote: float, alpha_reject: float
) -> None:
    with pytest.raises(ValueError, match="at least one vote"):
        Rules(most_votes, alpha_promote, alpha_reject)


@given(COUNTS, COUNTS)
def test_swapping_wins_and_losses_swaps_the_evidence_and_mirrors_the_interval(wins: int, losses: int) -> None:
    one, other = decide(Tally(wins, losses, 0), RULES), decide(Tally(losses, wins, 0), RULES)
    assert (one.evidence_better, one.evidence_worse) == (other.evidence_worse, other.evidence_better)
    assert one.interval.low == pytest.approx(1 - other.interval.high)
    opposite = {"better": "worse", "worse": "better"}
    assert one.outcome == opposite.get(other.outcome or "", other.outcome)


@given(COUNTS, COUNTS, st.integers(1, 100))
def test_ties_change_neither_evidence_nor_interval(wins: int, losses: int, ties: int) -> None:
    without, with_ties = decide(Tally(wins, losses, 0), RULES), decide(Tally(wins, losses, ties), RULES)
    assert without.evidence_better == with_ties.evidence_better
    assert without.evidence_worse == with_ties.evidence_worse
    assert without.interval == with_ties.interval


@given(COUNTS, COUNTS)
def test_a_win_adds_evidence_and_a_loss_takes_some(wins: int, losses: int) -> None:
    assert log_evidence(wins, losses + 1) < log_evidence(wins, losses) < log_evidence(wins + 1, losses)


@given(COUNTS, COUNTS)
def test_there_is_never_evidence_for_both(wins: int, losses: int) -> None:
    verdict = decide(Tally(wins, losses, 0), RULES)
    assert min(verdict.evidence_better, verdict.evidence_worse) <= 1


@given(COUNTS, COUNTS, st.sampled_from([0.01, 0.05, 0.2]))
def test_the_interval_holds_the_observed_rate_and_leaves_a_half_where_it_decides(
    wins: int, losses: int, alpha: float
) -> None:
    rules = Rules(10_000, alpha_promote=alpha)
    verdict = decide(Tally(wins, losses, 0), rules)
    assert 0 <= verdict.interval.low <= verdict.interval.high <= 1
    if wins + losses:
        assert verdict.interval.low <= wins / (wins + losses) <= verdict.interval.high
    if verdict.outcome == "better":
        assert verdict.interval.low > 0.5 - 1e-9
    if verdict.outcome == "worse":
        assert verdict.interval.high < 0.5 + 1e-9


@given(st.integers(1, 50), st.integers(1, 50), st.integers(2, 20))
def test_more_votes_of_the_same_rate_shorten_the_interval(wins: int, losses: int, times: int) -> None:
    few = find_interval(Tally(wins, losses, 0), RULES)
    many = find_interval(Tally(times * wins, times * losses, 0), RULES)
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize("num_votes", range(11))
def test_over_all_orders_of_equal_votes_the_evidence_is_one_on_average(num_votes: int) -> None:
    sequences = product((0, 1), repeat=num_votes)
    mean = math.fsum(evidence(sum(votes), num_votes - sum(votes)) for votes in sequences) / 2**num_votes
    assert mean == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.49])
def test_where_the_challenger_is_worse_the_evidence_shrinks_on_average(rate: float) -> None:
    means = [
        math.fsum(
            math.comb(votes, wins) * rate**wins * (1 - rate) ** (votes - wins) * evidence(wins, votes - wins)
            for wins in range(votes + 1)
        )
        for votes in range(11)
    ]
    assert all(later < earlier for earlier, later in pairwise(means))


def mean_evidence(num_votes: int, first_chosen: Fraction, challenger_first: Fraction) -> float:
    """Over everything that can happen in so many comparisons of an equal pair: who stands first, and which place is chosen."""
    chance_of = {
        # Challenger first and the first chosen, or second and the second chosen.
        True: challenger_first * first_chosen + (1 - challenger_first) * (1 - first_chosen),
        False: challenger_first * (1 - first_chosen) + (1 - challenger_first) * first_chosen,
    }
    return math.fsum(
        math.prod(chance_of[won] for won in votes) * evidence(sum(votes), num_votes - sum(votes))
        for votes in product((True, False), repeat=num_votes)
    )


@pytest.mark.parametrize("first_chosen", [Fraction(3, 5), Fraction(1, 5), Fraction(1)])
def test_side_bias_gives_no_evidence_where_the_order_is_drawn_and_much_where_it_is_not(
    first_chosen: Fraction,
) -> None:
    assert mean_evidence(8, first_chosen, challenger_first=Fraction(1, 2)) == pytest.approx(1, abs=1e-12)
    favoured = Fraction(1) if first_chosen > Fraction(1, 2) else Fraction(0)
    assert mean_evidence(8, first_chosen, challenger_first=favoured) > 1.4


def chance_to_ever(num_votes: int, rate: float, stops: set[tuple[int, int]]) -> float:
    """That a duel at this rate passes one of these (wins, losses) within so many decided votes; exact."""
    going = {(0, 0): 1.0}
    stopped = 0.0
    for _ in range(num_votes):
        after: dict[tuple[int, int], float] = {}
        for (wins, losses), chance in going.items():
            for place, share in (((wins + 1, losses), rate), ((wins, losses + 1), 1 - rate)):
                if place in stops:
                    stopped += chance * share
                else:
                    after[place] = after.get(place, 0.0) + chance * share
        going = after
    return stopped


def places(num_votes: int) -> list[tuple[int, int]]:
    return [(wins, votes - wins) for votes in range(1, num_votes + 1) for wins in range(votes + 1)]


def test_equal_policies_are_promoted_in_less_than_one_duel_of_twenty_however_often_one_looks() -> None:
    promoted = {place for place in places(300) if evidence(*place) >= 20}
    chance = chance_to_ever(300, 0.5, promoted)
    assert 0.02 < chance < 0.05
    assert chance_to_ever(300, 0.45, promoted) < chance / 5


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.6, 0.9])
def test_the_interval_hardly_ever_leaves_the_truth(rate: float) -> None:
    intervals = {place: find_interval(Tally(*place, 0), RULES) for place in places(100)}
    missed = {place for place, interval in intervals.items() if not interval.low <= rate <= interval.high}
    assert 0 < chance_to_ever(100, rate, missed) < 0.1
