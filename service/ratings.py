"""How good every policy is, by the votes of all its duels: its win rate, and its strength beside the base's. Used by `operator.py`.

Read from the duels' own tallies, as of their last look: a vote that its user took back after a duel had ended still counts in it.
"""

import asyncio
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from service.intervals import wilson
from service.policies import BASE
from service.tables import Duel

FIT = [sys.executable, "-m", "service.bradley_terry"]
FIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Met:
    """Votes between two policies."""

    first: str
    second: str
    first_wins: int
    second_wins: int
    ties: int


@dataclass(frozen=True, slots=True)
class Rating:
    """One policy's. A tie is half a win."""

    policy: str
    votes: int
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    strength: float | None = None
    """None: no votes lead from it to the base."""
    strength_low: float | None = None
    strength_high: float | None = None


class _Strength(msgspec.Struct):
    policy: str
    estimate: float
    low: float
    high: float


SIDES = ("first", "second", "ties")


async def read_tallies(session: AsyncSession) -> list[Met]:
    """Of all duels, a pair of policies at most once in either order."""
    votes: dict[tuple[str, str], Counter[str]] = {}
    for duel in await session.scalars(select(Duel).order_by(Duel.id)):
        pair = (duel.challenger, duel.incumbent)
        turned = pair[::-1] in votes
        count = votes.setdefault(pair[::-1] if turned else pair, Counter())
        names = ("losses", "wins", "ties") if turned else ("wins", "losses", "ties")
        count.update({name: duel.metrics.get(told, 0) for name, told in zip(SIDES, names, strict=True)})
    return [
        Met(first, second, count["first"], count["second"], count["ties"])
        for (first, second), count in votes.items()
    ]


async def rate(tallies: list[Met]) -> list[Rating]:
    """Every policy that had a vote, the strongest first; those that no votes connect with the base come last."""
    strengths = {strength.policy: strength for strength in await asyncio.to_thread(_fit, tallies)}
    wins: Counter[str] = Counter()
    votes: Counter[str] = Counter()
    for met in tallies:
        for policy, won in ((met.first, met.first_wins), (met.second, met.second_wins)):
            wins[policy] += 2 * won + met.ties  # halves
            votes[policy] += met.first_wins + met.second_wins + met.ties
    rated = [name for name in strengths if votes[name]]
    others = sorted(name for name, num in votes.items() if num and name not in strengths)
    return [_rating(name, wins[name] / 2, votes[name], strengths.get(name)) for name in rated + others]


def _rating(policy: str, wins: float, votes: int, strength: _Strength | None) -> Rating:
    rating = Rating(policy, votes, wins / votes, *wilson(wins, votes))
    if strength is None:
        return rating
    return replace(
        rating,
        strength=strength.estimate,
        strength_low=strength.low,
        strength_high=strength.high,
    )


def _fit(tallies: list[Met]) -> list[_Strength]:
    """By a process of its own: what it needs for a second would double what the service holds in memory."""
    asked = msgspec.json.encode({"base": BASE, "tallies": tallies})
    done = subprocess.run(FIT, input=asked, stdout=subprocess.PIPE, timeout=FIT_SECONDS, check=True)
    return msgspec.json.decode(done.stdout, type=list[_Strength])
