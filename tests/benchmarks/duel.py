"""`make bench-duel`: how often duels err, and how many votes they take, by simulation with a look after every vote.

The boundary is read off `service.duel.decide`, once for every number of decided votes; the votes are then drawn and read by
the thousand. Beside it, on the same votes: Wald's sequential test that knows the true rate, and a binomial test of fixed size.
Writes Markdown to standard output and all figures to `results/duel.json`.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from service.duel import Rules, Tally, decide
from service.settings import Settings
from tests.benchmarks.tables import write_results
from trainer.demo_scores import as_markdown

LEVEL = 0.05
POWER = 0.9
"""Of the two tests beside ours: what they are made for."""
BATCH = 1000
"""Duels at once: their votes take some 50 MB."""
RATES = (0.55, 0.60, 0.70)
TASTE = 0.1
"""Where tastes differ: at .1, 37 % of users choose the same one of an equal pair in at least 65 % of their votes."""
VOTES_PER_USER = (1, 3, 10, 100)
USUAL_VOTES: int = Settings.model_fields["duel_votes"].default
"""Most votes of a duel where the operator sets nothing."""
ERRORS = ("an equal pair", "promoted", "rejected", "undecided")
SPEED = (
    "challenger wins",
    "promoted",
    f"within {USUAL_VOTES} votes",
    "half by vote",
    "90 % by vote",
    "votes on average, if stopped there",
    "fixed size: votes",
    "SPRT: half by vote",
    "SPRT: votes on average",
)


@dataclass(frozen=True, slots=True)
class Voters:
    """How simulated users vote."""

    rate: float = 0.5
    """Of decided votes that the challenger wins, side bias apart."""
    ties: float = 0.0
    """Share of votes."""
    first: float = 0.5
    """Of an equal pair, how often the first is chosen."""
    challenger_first: float = 0.5
    """How often the challenger stands first."""
    votes_per_user: int = 1
    """One after the other."""
    taste: float = 0.0
    """Correlation of two votes of one user: each has a win rate of their own, drawn from a beta distribution around `rate`."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a test stops; element n is for n decided votes."""

    promote: NDArray[np.int32]
    """Least wins that promote; n + 1 where none do."""
    reject: NDArray[np.int32]
    """Most wins that reject; -1 where none do."""


@dataclass(frozen=True, slots=True)
class Tallies:
    """Of many duels after every vote: [duels, votes]."""

    wins: NDArray[np.int32]
    decided: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Ends:
    """Of many duels: [duels]."""

    promoted: NDArray[np.bool_]
    rejected: NDArray[np.bool_]
    votes: NDArray[np.int64]
    """Most votes where undecided."""


@dataclass(frozen=True, slots=True)
class Errors:
    """What happened to equal pairs; shares of the duels."""

    voters: str
    duels: int
    promoted: float
    rejected: float
    undecided: float

    @property
    def row(self) -> list[str]:
        shares = (self.promoted, self.rejected, self.undecided)
        return [self.voters, *(_percent(share, self.duels) for share in shares)]


@dataclass(frozen=True, slots=True)
class Speed:
    """How soon a better challenger was promoted; None: not within the most votes."""

    rate: float
    duels: int
    promoted: float
    promoted_usually: float
    """Within `USUAL_VOTES`."""
    median: int | None
    nine_tenths: int | None
    mean_stopped: float | None
    """With the 90th percentile as most votes: then the power is that of the other two tests."""
    fixed_size: int
    sprt_median: int | None
    sprt_mean: float

    @property
    def row(self) -> list[str]:
        numbers = (
            self.median,
            self.nine_tenths,
            self.mean_stopped,
            self.fixed_size,
            self.sprt_median,
            self.sprt_mean,
        )
        shown = ["never" if number is None else f"{number:.0f}" for number in numbers]
        shares = (self.promoted, self.promoted_usually)
        return [f"{self.rate:.2f}", *(_percent(share, self.duels) for share in shares), *shown]


def main() -> None:
    """Simulate and report."""
    options = _options()
    rules = Rules(most_votes=options.votes, alpha_promote=LEVEL, alpha_reject=LEVEL)
    chance = np.random.default_rng(options.seed)
    errors = measure_errors(rules, options.duels, chance)
    speeds = [measure_speed(rate, rules, options.duels, chance) for rate in RATES]
    print(report(rules, options.duels, errors, speeds))
    write_results(
        "duel",
        {
            "duels": options.duels,
            "most_votes": options.votes,
            "seed": options.seed,
            "errors": [asdict(error) for error in errors],
            "speeds": [asdict(speed) for speed in speeds],
        },
    )


def report(rules: Rules, duels: int, errors: Sequence[Errors], speeds: Sequence[Speed]) -> str:
    """Both tables, as Markdown."""
    return (
        f"{duels:,} duels each, at most {rules.most_votes:,} votes, a look after every vote; ± one standard error\n\n"
        f"{as_markdown(ERRORS, [error.row for error in errors])}\n"
        f"The other two tests have level {LEVEL:.0%} and power {POWER:.0%}; the SPRT knows the true rate.\n\n"
        f"{as_markdown(SPEED, [speed.row for speed in speeds])}"
    )


def measure_errors(rules: Rules, duels: int, chance: np.random.Generator) -> list[Errors]:
    """Of equal pairs: what the duel promises, and then what it takes to break that: order, looks, and users who vote often."""
    ours = duel_boundary(rules)
    cases = {
        "plain": (Voters(), ours),
        "30 % ties": (Voters(ties=0.3), ours),
        "60:40 for the first reply": (Voters(first=0.6), ours),
        "60:40 for the first reply, challenger always first": (Voters(first=0.6, challenger_first=1.0), ours),
        "plain, by a 5 % binomial test after every vote": (Voters(), naive_boundary(rules.most_votes)),
    }
    for times in VOTES_PER_USER:
        cases[f"tastes differ; votes of each user: {times}"] = (
            Voters(votes_per_user=times, taste=TASTE),
            ours,
        )
    results = []
    for name, (voters, boundary) in cases.items():
        (ends,) = run_duels(voters, [boundary], rules.most_votes, duels, chance)
        outcomes = (ends.promoted, ends.rejected, ~(ends.promoted | ends.rejected))
        results.append(Errors(name, duels, *(float(outcome.mean()) for outcome in outcomes)))
    return results


def measure_speed(rate: float, rules: Rules, duels: int, chance: np.random.Generator) -> Speed:
    """Of a challenger that wins at this rate; all tests read the same votes."""
    boundaries = [duel_boundary(rules), sprt_boundary(rate, rules.most_votes)]
    ours, sprt = run_duels(Voters(rate), boundaries, rules.most_votes, duels, chance)
    nine_tenths = votes_until(POWER, ours)
    return Speed(
        rate=rate,
        duels=duels,
        promoted=float(ours.promoted.mean()),
        promoted_usually=float((ours.promoted & (ours.votes <= USUAL_VOTES)).mean()),
        median=votes_until(0.5, ours),
        nine_tenths=nine_tenths,
        mean_stopped=float(np.minimum(ours.votes, nine_tenths).mean()) if nine_tenths else None,
        fixed_size=fixed_size(rate),
        sprt_median=votes_until(0.5, sprt),
        sprt_mean=float(sprt.votes.mean()),
    )


def duel_boundary(rules: Rules) -> Boundary:
    """As `decide` has it. Both sides only rise with the number of votes, so each is walked along once."""

    def outcome(wins: int, decided: int) -> str | None:
        return decide(Tally(wins, decided - wins, 0), rules).outcome

    return _walk(
        rules.most_votes,
        promotes=lambda wins, decided: outcome(wins, decided) == "better",
        rejects=lambda wins, decided: outcome(wins, decided) == "worse",
    )


def sprt_boundary(rate: float, most_votes: int) -> Boundary:
    """Wald's sequential probability ratio test of `rate` against 1/2, with his approximate bounds.

    No test with its error rates needs fewer votes on average. Sources: Wald, 1945, Annals of Mathematical Statistics 16,
    117-186; Wald and Wolfowitz, 1948, 19, 326-339.
    """

    def ratio(wins: int, decided: int) -> float:
        return wins * math.log(2 * rate) + (decided - wins) * math.log(2 * (1 - rate))

    return _walk(
        most_votes,
        promotes=lambda wins, decided: ratio(wins, decided) >= math.log(POWER / LEVEL),
        rejects=lambda wins, decided: ratio(wins, decided) <= math.log((1 - POWER) / (1 - LEVEL)),
    )


def naive_boundary(most_votes: int) -> Boundary:
    """The binomial test for votes whose number was fixed beforehand, wrongly read after every vote."""
    least = [critical_wins(votes) for votes in range(most_votes + 1)]
    return _as_boundary(least, [votes - wins for votes, wins in enumerate(least)])


def fixed_size(rate: float) -> int:
    """Fewest votes with which a one-sided binomial test has the power at this rate."""
    votes = 1
    while binomial(votes, rate)[critical_wins(votes) :].sum() < POWER:
        votes += 1
    return votes


def critical_wins(votes: int) -> int:
    """Fewest wins of so many votes that an equal pair reaches with a chance of at most the level."""
    at_least = binomial(votes, 0.5)[::-1].cumsum()
    return votes + 1 - int((at_least <= LEVEL).sum())


def binomial(votes: int, rate: float) -> NDArray[np.float64]:
    """Chances of 0 to `votes` wins."""
    log_factorials = np.concatenate(([0.0], np.log(np.arange(1, votes + 1)).cumsum()))
    wins = np.arange(votes + 1)
    ways = log_factorials[-1] - log_factorials - log_factorials[::-1]
    chances: NDArray[np.float64] = np.exp(ways + wins * math.log(rate) + (votes - wins) * math.log(1 - rate))
    return chances


def run_duels(
    voters: Voters, boundaries: Sequence[Boundary], most_votes: int, duels: int, chance: np.random.Generator
) -> list[Ends]:
    """All duels, each to its end, by each of the boundaries on the same votes."""
    batches = []
    for start in range(0, duels, BATCH):
        tallies = draw_votes(voters, min(BATCH, duels - start), most_votes, chance)
        batches.append([read_votes(tallies, boundary) for boundary in boundaries])
    return [_join(ends) for ends in zip(*batches, strict=True)]


def draw_votes(voters: Voters, duels: int, votes: int, chance: np.random.Generator) -> Tallies:
    """Side bias and merit add up as log-odds (Bradley and Terry's model with an order effect: Davidson and Beaver, 1977)."""
    merit, bias = _logit(_draw_rates(voters, duels, votes, chance)), _logit(np.array(voters.first))
    stands_first = chance.random((duels, votes), dtype=np.float32) < voters.challenger_first
    wins_if = 1 / (1 + np.exp(-merit - np.where(stands_first, bias, -bias)))
    won = chance.random((duels, votes), dtype=np.float32) < wins_if
    decided = chance.random((duels, votes), dtype=np.float32) >= voters.ties
    return Tallies((won & decided).cumsum(1, dtype=np.int32), decided.cumsum(1, dtype=np.int32))


def _draw_rates(voters: Voters, duels: int, votes: int, chance: np.random.Generator) -> NDArray[np.float64]:
    """Each vote's win rate, its user's: [duels, votes], or [1, 1] where all users are alike."""
    if not voters.taste:
        return np.full((1, 1), voters.rate)
    spread = 1 / voters.taste - 1
    users = math.ceil(votes / voters.votes_per_user)
    rates = chance.beta(voters.rate * spread, (1 - voters.rate) * spread, (duels, users))
    return rates.repeat(voters.votes_per_user, 1)[:, :votes]


def read_votes(tallies: Tallies, boundary: Boundary) -> Ends:
    """Each duel's first vote at which it ends."""
    promotes = tallies.wins >= boundary.promote[tallies.decided]
    ends = promotes | (tallies.wins <= boundary.reject[tallies.decided])
    # argmax gives the first True, and 0 where there is none.
    at = ends.argmax(1)
    duels = np.arange(len(at))
    ended, promoted = ends[duels, at], promotes[duels, at]
    return Ends(promoted, ended & ~promoted, np.where(ended, at + 1, ends.shape[1]))


def votes_until(share: float, ends: Ends) -> int | None:
    """The vote by which this share of all duels has promoted the challenger."""
    needed = math.ceil(share * len(ends.votes))
    promoted = np.sort(ends.votes[ends.promoted])
    return int(promoted[needed - 1]) if needed <= len(promoted) else None


def _walk(
    most_votes: int, promotes: Callable[[int, int], bool], rejects: Callable[[int, int], bool]
) -> Boundary:
    least, most = [1], [-1]
    for decided in range(1, most_votes + 1):
        wins = least[-1]
        while wins <= decided and not promotes(wins, decided):
            wins += 1
        least.append(wins)
        wins = most[-1]
        while rejects(wins + 1, decided):
            wins += 1
        most.append(wins)
    return _as_boundary(least, most)


def _as_boundary(least: list[int], most: list[int]) -> Boundary:
    return Boundary(np.array(least, dtype=np.int32), np.array(most, dtype=np.int32))


def _join(ends: Sequence[Ends]) -> Ends:
    return Ends(
        np.concatenate([end.promoted for end in ends]),
        np.concatenate([end.rejected for end in ends]),
        np.concatenate([end.votes for end in ends]),
    )


def _logit(rates: NDArray[np.float64]) -> NDArray[np.float32]:
    odds: NDArray[np.float32] = (np.log(rates) - np.log1p(-rates)).astype(np.float32)
    return odds


def _percent(share: float, duels: int) -> str:
    """With its binomial standard error."""
    return f"{share:.2%} ± {100 * math.sqrt(share * (1 - share) / duels):.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How often duels err, and how many votes they take.")
    parser.add_argument("--duels", type=int, default=10_000)
    parser.add_argument("--votes", type=int, default=2_000, help="most votes of a duel")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
