"""Ratings: strengths worked by hand, what Bradley and Terry's model must do, and the call."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.bradley_terry import PRIOR, Tally, fit
from tests.service.conftest import Rows, Serve, command_line
from tests.service.fake_engine import FakeEngine

BASE, ONE, TWO, THREE = (f"policy-00000{number}" for number in range(4))


def logit(wins: float, losses: float) -> float:
    return math.log((wins + PRIOR) / (losses + PRIOR))


def test_with_two_policies_the_strength_is_the_logarithm_of_the_odds() -> None:
    [one, base] = fit(BASE, [Tally(ONE, BASE, 30, 10, 4)])
    assert (one.policy, base.policy, base.estimate, base.low, base.high) == (ONE, BASE, 0, 0, 0)
    assert one.estimate == pytest.approx(logit(32, 12), abs=1e-6)
    # Of a logarithm of odds of n votes: 1 / sqrt(n p (1 - p)), with one vote more for the prior.
    share = (32 + PRIOR) / 45
    assert one.high - one.estimate == pytest.approx(1.96 / math.sqrt(45 * share * (1 - share)), rel=1e-6)
    assert one.estimate - one.low == pytest.approx(one.high - one.estimate)


def test_strengths_add_up_along_a_chain_and_uncertainty_does_too() -> None:
    found = {
        each.policy: each for each in fit(BASE, [Tally(ONE, BASE, 60, 40, 0), Tally(TWO, ONE, 70, 30, 0)])
    }
    assert found[ONE].estimate == pytest.approx(logit(60, 40), abs=1e-6)
    assert found[TWO].estimate == pytest.approx(logit(60, 40) + logit(70, 30), abs=1e-6)
    errors = {name: (each.high - each.low) / (2 * 1.96) for name, each in found.items()}
    second = 1 / math.sqrt(101 * 70.5 / 101 * 30.5 / 101)
    assert errors[TWO] == pytest.approx(math.hypot(errors[ONE], second), rel=1e-6)


def test_who_won_every_vote_is_strong_but_not_endlessly() -> None:
    [one, _] = fit(BASE, [Tally(ONE, BASE, 20, 0, 0)])
    assert one.estimate == pytest.approx(math.log(20.5 / 0.5), abs=1e-5)
    assert math.isfinite(one.high)


def test_who_never_met_anybody_of_the_base_s_circle_has_no_strength() -> None:
    tallies = [Tally(ONE, BASE, 3, 1, 0), Tally(THREE, TWO, 5, 5, 0), Tally(TWO, BASE, 0, 0, 0)]
    assert {each.policy for each in fit(BASE, tallies)} == {BASE, ONE}
    assert [each.policy for each in fit(BASE, [])] == [BASE]


COUNT = st.integers(0, 40)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(COUNT, COUNT, COUNT), min_size=3, max_size=3))
def test_at_the_estimate_each_policy_is_expected_to_win_as_often_as_it_did(
    counts: list[tuple[int, int, int]],
) -> None:
    """What makes it the likeliest one; the prior's half votes count."""
    pairs = [(ONE, BASE), (TWO, ONE), (TWO, BASE)]
    tallies = [Tally(*pair, *count) for pair, count in zip(pairs, counts, strict=True)]
    found = {each.policy: each.estimate for each in fit(BASE, tallies)}
    for name in found.keys() - {BASE}:
        won = expected = 0.0
        for tally in tallies:
            votes = tally.first_wins + tally.second_wins + tally.ties
            if name not in (tally.first, tally.second) or not votes:
                continue
            other = tally.second if name == tally.first else tally.first
            mine = tally.first_wins if name == tally.first else tally.second_wins
            won += mine + tally.ties / 2 + PRIOR
            expected += (votes + 2 * PRIOR) / (1 + math.exp(found[other] - found[name]))
        assert won == pytest.approx(expected, abs=1e-3)


@pytest.mark.database
def test_the_ratings_are_those_of_all_duels_with_votes(
    serve: Serve, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(FakeEngine())
    assert client.get("/operator/ratings").json() == []
    for name in (ONE, TWO, THREE):
        rows("INSERT INTO policies (name, path, state, manifest) VALUES (%s, 'p', 'rejected', '{}')", name)
    for challenger, incumbent, metrics in (
        (ONE, BASE, '{"wins": 30, "losses": 10, "ties": 4}'),
        (BASE, ONE, '{"wins": 1, "losses": 3, "ties": 0}'),  # the same pair, the other way round
        (TWO, ONE, '{"wins": 20, "losses": 20, "ties": 0}'),
        (THREE, TWO, "{}"),
    ):
        rows(
            "INSERT INTO duels (kind, challenger, incumbent, votes_per_user, outcome, metrics, ended_at)"
            " VALUES ('trial', %s, %s, 1, 'undecided', %s, now())",
            challenger,
            incumbent,
            metrics,
        )
    rated: list[dict[str, Any]] = client.get("/operator/ratings").json()
    assert [(each["policy"], each["votes"]) for each in rated] in (
        [(ONE, 88), (TWO, 40), (BASE, 48)],
        [(TWO, 40), (ONE, 88), (BASE, 48)],
    )
    found = {each["policy"]: each for each in rated}
    assert found[ONE]["strength"] == pytest.approx(logit(35, 13), abs=1e-6)
    assert found[TWO]["strength"] == pytest.approx(found[ONE]["strength"], abs=1e-6)
    assert found[ONE]["win_rate"] == pytest.approx((35 + 20) / 88)
    assert found[ONE]["win_rate_low"] < found[ONE]["win_rate"] < found[ONE]["win_rate_high"]
    assert found[BASE]["strength"] == 0
    shown = command_line(client, monkeypatch)("ratings").output.splitlines()
    assert {line.split()[0] for line in shown[1:]} == {BASE, ONE, TWO}
    assert f"{found[ONE]['strength']:.3f} [{found[ONE]['strength_low']:.3f}, " in " ".join(shown)
