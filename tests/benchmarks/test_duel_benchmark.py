"""The duel benchmark's own arithmetic, and a small run of it."""

import sys

import numpy as np
import pytest

from service.duel import Rules, Tally, decide
from tests.benchmarks import duel
from tests.benchmarks.duel import (
    Boundary,
    Ends,
    Tallies,
    Voters,
    binomial,
    critical_wins,
    duel_boundary,
    fixed_size,
    read_votes,
    run_duels,
    sprt_boundary,
    votes_until,
)

RULES = Rules(most_votes=60)


def test_the_boundary_is_where_decide_changes_its_mind() -> None:
    boundary = duel_boundary(RULES)
    for decided in range(RULES.most_votes):
        for wins in range(decided + 1):
            outcome = decide(Tally(wins, decided - wins, 0), RULES).outcome
            assert (outcome == "better") == (wins >= boundary.promote[decided])
            assert (outcome == "worse") == (wins <= boundary.reject[decided])


def test_walds_boundary_by_hand() -> None:
    # A win adds ln 1.5 = .405, a loss takes ln 2 = .693; ln(.9 / .05) = 2.89 is 8 wins, ln(.1 / .95) = -2.25 is 4 losses.
    boundary = sprt_boundary(0.75, 8)
    assert list(boundary.promote[:9]) == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert list(boundary.reject[:5]) == [-1, -1, -1, -1, 0]


def test_a_binomial_test_by_hand() -> None:
    assert binomial(3, 0.2) == pytest.approx([0.512, 0.384, 0.096, 0.008])
    # Four of four happens once in 16, five of five once in 32; four or more of five six times.
    assert [critical_wins(votes) for votes in (4, 5)] == [5, 5]
    # .99^5 = .95; fewer than five votes prove nothing.
    assert fixed_size(0.99) == 5


def test_a_duel_ends_at_its_first_vote_beyond_the_boundary() -> None:
    boundary = Boundary(np.array([1, 2, 2, 3], np.int32), np.array([-1, -1, 0, 0], np.int32))
    # Win, tie, win, loss; loss, loss, win, win; win, loss, tie, tie.
    tallies = Tallies(
        wins=np.array([[1, 1, 2, 2], [0, 0, 1, 2], [1, 1, 1, 1]], np.int32),
        decided=np.array([[1, 1, 2, 3], [1, 2, 3, 3], [1, 2, 2, 2]], np.int32),
    )
    ends = read_votes(tallies, boundary)
    assert list(ends.promoted) == [True, False, False]
    assert list(ends.rejected) == [False, True, False]
    assert list(ends.votes) == [3, 2, 4]


def test_percentiles_count_duels_that_never_promote() -> None:
    promoted = np.array([True, True, True, False])
    ends = Ends(promoted, ~promoted, np.array([30, 10, 20, 1]))
    assert [votes_until(share, ends) for share in (0.25, 0.5, 0.75, 0.9)] == [10, 20, 30, None]


def test_voters_vote_as_they_are_told() -> None:
    chance = np.random.default_rng(0)
    rules = Rules(most_votes=30)
    boundaries = [duel_boundary(rules)]
    (certain,) = run_duels(Voters(rate=1 - 1e-9), boundaries, 30, 10, chance)
    assert certain.promoted.all()
    assert set(certain.votes) == {12}
    (hopeless,) = run_duels(Voters(rate=1e-9), boundaries, 30, 10, chance)
    assert hopeless.rejected.all()
    (silent,) = run_duels(Voters(ties=1.0), boundaries, 30, 10, chance)
    assert set(silent.votes) == {30}
    tallies = duel.draw_votes(Voters(ties=0.3, first=0.6, challenger_first=1.0), 100, 1000, chance)
    assert tallies.decided[:, -1].sum() == pytest.approx(70_000, rel=0.01)
    assert (tallies.wins[:, -1] / tallies.decided[:, -1]).mean() == pytest.approx(0.6, abs=0.01)


def test_users_have_tastes_of_their_own() -> None:
    voters = Voters(rate=0.6, votes_per_user=50, taste=0.1)
    tallies = duel.draw_votes(voters, 4000, 50, np.random.default_rng(0))
    rates = tallies.wins[:, -1] / 50
    assert rates.mean() == pytest.approx(0.6, abs=0.01)
    # A user's rate varies by .6 * .4 * .1 = .024; 50 votes add the rest, (.24 - .024) / 50.
    assert rates.var() == pytest.approx(0.024 + 0.216 / 50, rel=0.1)


def test_five_hundred_duels_end_in_a_table_that_adds_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: dict[str, object] = {}
    monkeypatch.setattr(duel, "write_results", lambda name, figures: written.update(figures, name=name))
    monkeypatch.setattr(sys, "argv", ["duel", "--duels", "500", "--votes", "400"])
    duel.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if " ± " in line]
    errors, speeds = [row for row in rows if len(row) == 4], [row for row in rows if len(row) == 9]
    assert (len(errors), len(speeds)) == (9, 3)
    for row in errors:
        assert sum(share(cell) for cell in row[1:]) == pytest.approx(100, abs=0.03)
    for fair in [*errors[:3], errors[5]]:
        assert share(fair[1]) < 8
        assert share(fair[2]) < 8
    # What the order's randomness and the sequential test are for.
    assert share(errors[3][1]) > 50
    assert share(errors[4][1]) > 15
    assert share(errors[8][1]) > share(errors[6][1])
    assert speeds[2][1] == speeds[2][2]
    assert share(speeds[2][1]) > 99
    median, nine_tenths, mean, fixed, sprt_median, sprt_mean = map(float, speeds[2][3:])
    assert median < mean < nine_tenths
    assert median < fixed < nine_tenths
    assert sprt_median <= median
    assert sprt_mean < mean
    assert speeds[0][4] == "never"
    assert written["name"] == "duel"


def share(cell: str) -> float:
    return float(cell.partition("%")[0])
