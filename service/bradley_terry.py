"""Strengths of all policies by the votes of their duels, fit by choix. A process of its own: numpy and scipy stay out of the service.

    python -m service.bradley_terry < TALLIES > RATINGS

- *Model*: the policy i is preferred to j with a chance of 1 / (1 + exp(s_j - s_i)) (Bradley and Terry, 1952, Biometrika 39). So two
  policies can be compared that never met, by way of those that both met. Strengths are relative to the base's, which is 0.
- *Ties* are half a win of each.
- *Prior*: half a vote for each side of every pair that met, or a policy that won all its votes would be infinitely strong.
- *Intervals*: 95 %, from the curvature of the likelihood at its peak (the Fisher information, the base's strength held at 0). They
  hold for one look: duels, which are watched vote by vote, have intervals of their own kind (`duel.py`).

Used by `ratings.py`.
"""

import sys
from collections.abc import Sequence

import choix
import msgspec
import numpy as np
from numpy.typing import NDArray

Z = 1.96
"""Two-sided 95 % of a normal distribution."""
PRIOR = 0.5
MOST_STEPS = 10_000
Array = NDArray[np.float64]


class Tally(msgspec.Struct, frozen=True):
    """Votes between two policies."""

    first: str
    second: str
    first_wins: int
    second_wins: int
    ties: int


class Strength(msgspec.Struct, frozen=True):
    """Natural logarithm of the odds to be preferred to the base, and its interval."""

    policy: str
    estimate: float
    low: float
    high: float


class Asked(msgspec.Struct, frozen=True):
    """What comes in."""

    base: str
    tallies: list[Tally]


def fit(base: str, tallies: Sequence[Tally]) -> list[Strength]:
    """Strengths of the policies that votes connect with the base, the strongest first."""
    names = _connected(base, tallies)
    if len(names) == 1:
        return [Strength(base, 0.0, 0.0, 0.0)]
    wins = _count_wins(names, tallies)
    strengths = choix.ilsr_pairwise_dense(wins, max_iter=MOST_STEPS)
    strengths -= strengths[0]
    errors = _standard_errors(strengths, wins)
    found = [
        Strength(name, float(s), float(s - Z * error), float(s + Z * error))
        for name, s, error in zip(names, strengths, errors, strict=True)
    ]
    return sorted(found, key=lambda strength: -strength.estimate)


def _connected(base: str, tallies: Sequence[Tally]) -> list[str]:
    """The base, and every policy that votes lead to from there."""
    met = [tally for tally in tallies if tally.first_wins + tally.second_wins + tally.ties]
    names = [base]
    for name in names:  # grows meanwhile
        for tally in met:
            pair = (tally.first, tally.second)
            if name in pair:
                names += [other for other in pair if other not in names]
    return names


def _count_wins(names: Sequence[str], tallies: Sequence[Tally]) -> Array:
    """(N, N): how often the row's policy was preferred to the column's, with the prior."""
    number = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for tally in tallies:
        if tally.first in number and tally.second in number:
            i, j = number[tally.first], number[tally.second]
            wins[i, j] += tally.first_wins + tally.ties / 2
            wins[j, i] += tally.second_wins + tally.ties / 2
    return wins + PRIOR * (wins + wins.T > 0)


def _standard_errors(strengths: Array, wins: Array) -> Array:
    """(N,): of each strength, where the first one is known to be 0."""
    chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))  # (N, N): row preferred to column
    weights = (wins + wins.T) * chance * (1 - chance)
    information = np.diag(weights.sum(axis=1)) - weights
    covariance = np.linalg.inv(information[1:, 1:])
    return np.concatenate([[0.0], np.sqrt(np.diag(covariance))])


if __name__ == "__main__":
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    sys.stdout.buffer.write(msgspec.json.encode(fit(asked.base, asked.tallies)))
