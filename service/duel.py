"""The duel's mathematics: what users' blind votes between live and challenger prove. Pure; who may vote is the caller's matter.

The test may be read after every vote, for ever, and still errs as seldom as it promises:

- *Bet.* If the challenger is no better, each decided vote is its win with a chance of at most 1/2, whatever came before. Bet on
  its wins with a rate p > 1/2: the stake times 2p at each win, times 2(1 - p) at each loss. No such bet gains on average,
  nor does any mixture of them over p: this evidence is a supermartingale that starts at 1 (a martingale if both are equal).
- *Ville's inequality* (J. Ville, 1939, Étude critique de la notion de collectif): such a process ever reaches 1/alpha with a
  chance of at most alpha. So the challenger is promoted where the evidence that it is better reaches 1/alpha, and rejected
  where the evidence that it is worse does, which is the same with wins and losses swapped.
- The mixture is H. Robbins' (1970, Annals of Mathematical Statistics 41, 1397-1409); with all weight on one p it is Wald's test.

What that needs, and why it holds:

- *Ties*, and votes for neither, place no bet: a factor of 1, which is exact however often they come.
- *Side bias.* Orders are drawn at random. Of an equal pair, whoever chooses the first reply with chance b chooses the challenger
  with chance b/2 + (1 - b)/2 = 1/2. With a fixed order it would be b, and bias would be taken for merit.
- *Blind.* A comparison names its policies once it was voted on, so a vote that was revised afterwards is not blind.
- *Independent.* Past votes must not tell the next one. One user's votes do: they are one taste, repeated. The promise is exact where
  the caller counts one vote of each user, and fades with each more (`make bench-duel` shows how fast); or where there is but one
  user, and it is enough that the challenger is better for them. And the caller stops at the first verdict.

The promise is for each duel: of many challengers that are no better, a share of up to alpha is promoted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["better", "worse", "undecided"]

BETS = tuple(0.5 + 0.04 * 1.2**step for step in range(11))
"""The rates that are bet on, with equal weights: .54 to .75, each lead over a half a fifth larger than the last. Any choice keeps the
promise; this one decides early where policies differ as they do from one cycle to the next. Median votes until a challenger is
promoted that wins .55, .60, .70 of them: 548, 136, 40. With equal steps of .01 from .52 to .75: 639, 134, 36; from .51 to .99:
795, 165, 37. (Exact, by recursion over votes; at most 2,000 of them. Simulated: `make bench-duel`.)"""
LARGEST_LOG = 700.0
"""Of evidence: its exponential still is a float, where votes go on long after the verdict."""
HALVINGS = 40
"""Of a bound's bracket: more exact than anyone reads."""


@dataclass(frozen=True, slots=True)
class Rules:
    """When a duel ends."""

    most_votes: int
    """Ties included. Then it ends undecided."""
    alpha_promote: float = 0.05
    """Greatest chance that a challenger that is no better is promoted."""
    alpha_reject: float = 0.05
    """Greatest chance that a challenger that is no worse is rejected."""

    def __post_init__(self) -> None:
        if self.most_votes < 1 or not (0 < self.alpha_promote < 0.5 and 0 < self.alpha_reject < 0.5):
            raise ValueError("A duel needs at least one vote, and error rates between 0 and 0.5.")


@dataclass(frozen=True, slots=True)
class Tally:
    """Votes so far, as the challenger sees them."""

    wins: int
    losses: int
    ties: int
    """Votes for neither, too."""

    @property
    def decided(self) -> int:
        return self.wins + self.losses

    @property
    def votes(self) -> int:
        return self.decided + self.ties

    @property
    def win_rate(self) -> float | None:
        """Of all votes, a tie being half a win; None without votes."""
        return (self.wins + self.ties / 2) / self.votes if self.votes else None


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval that holds at all times at once."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a tally says."""

    outcome: Outcome | None
    """None: the duel goes on."""
    evidence_better: float
    """What a stake of 1 on the challenger has become. At 1/alpha it is promoted."""
    evidence_worse: float
    win_rate: float | None
    """Of all votes, a tie being half a win."""
    interval: Interval
    """Of the challenger's chance of winning a *decided* vote."""


def decide(tally: Tally, rules: Rules) -> Verdict:
    """The verdict on these votes. To be asked after every vote; the first outcome stands."""
    better = log_evidence(tally.wins, tally.losses)
    worse = log_evidence(tally.losses, tally.wins)
    outcome: Outcome | None = None
    # Both cannot be: a stake on the side that has fewer wins has shrunk.
    if better >= -math.log(rules.alpha_promote):
        outcome = "better"
    elif worse >= -math.log(rules.alpha_reject):
        outcome = "worse"
    elif tally.votes >= rules.most_votes:
        outcome = "undecided"
    return Verdict(
        outcome=outcome,
        evidence_better=math.exp(min(better, LARGEST_LOG)),
        evidence_worse=math.exp(min(worse, LARGEST_LOG)),
        win_rate=tally.win_rate,
        interval=find_interval(tally, rules),
    )


def log_evidence(wins: int, losses: int) -> float:
    """Logarithm of the mixture over p in `BETS` of (2p)^wins (2(1 - p))^losses: of that wins are likelier than losses."""
    return _log_sum([_log_bet(p, wins, losses) for p in BETS]) - math.log(len(BETS))


def find_interval(tally: Tally, rules: Rules) -> Interval:
    """The rates of winning a decided vote that these votes leave open; both alphas together bound the chance to ever miss the truth.

    The evidence against a rate q is the mixture's likelihood over q's, a martingale where q is true: q is left open while that is
    below 1/(alpha_promote + alpha_reject). Both directions share the stake as they share the errors, and so the interval leaves 1/2
    with the vote that decides, or a moment sooner. Bets end at .75, so rates far beyond get a longer interval than they need.
    Source: Darling and Robbins, 1967, PNAS 58, 66-68; arXiv:1810.08240.
    """
    stake = rules.alpha_promote + rules.alpha_reject
    mixture = _log_sum(
        [
            math.log(rules.alpha_promote) + log_evidence(tally.wins, tally.losses),
            math.log(rules.alpha_reject) + log_evidence(tally.losses, tally.wins),
        ]
    ) - math.log(stake)

    def is_open(rate: float) -> bool:
        return mixture - _log_bet(rate, tally.wins, tally.losses) < -math.log(stake)

    # The likelihood has one peak, at the observed rate, which therefore is open; beyond an edge all is excluded.
    observed = tally.wins / tally.decided if tally.decided else 0.5
    return Interval(
        low=_find_edge(observed, 0.0, is_open) if tally.wins else 0.0,
        high=_find_edge(observed, 1.0, is_open) if tally.losses else 1.0,
    )


def _log_bet(rate: float, wins: int, losses: int) -> float:
    """Of a stake of 1 that was always on `rate`; in (0, 1), or at an end that no vote contradicts."""
    return (wins * math.log(2 * rate) if wins else 0.0) + (losses * math.log(2 - 2 * rate) if losses else 0.0)


def _log_sum(logs: list[float]) -> float:
    largest = max(logs)
    return largest + math.log(sum(math.exp(log - largest) for log in logs))


def _find_edge(inside: float, outside: float, is_open: Callable[[float], bool]) -> float:
    """Where openness ends, by bisection; on the side that is not open, lest the interval be too short."""
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        if is_open(middle):
            inside = middle
        else:
            outside = middle
    return outside
