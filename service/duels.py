"""The record of duels: begun, counted and ended, a transaction each. What a tally proves is `duel.py`'s to say.

Used by the referee, who decides, and by the operator's calls.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from service.duel import Tally
from service.tables import Deployment, Duel, Vote

MANY_USERS = 50
"""Voters within 30 days from which on one vote of each counts."""
ALL_VOTES = 1 << 30

Kind = Literal["trial", "watch"]
Outcome = Literal["better", "worse", "undecided", "stopped"]


@dataclass(frozen=True, slots=True)
class Match:
    """An open duel, for whoever pairs replies."""

    id: int
    kind: Kind
    challenger: str
    incumbent: str

    def fits(self, deployment: Deployment) -> bool:
        """Whether it is still the one that the pointer asks for: another change may have overtaken it."""
        if self.kind == "trial":
            return (deployment.challenger, deployment.live) == (self.challenger, self.incumbent)
        return (deployment.live, deployment.previous) == (self.challenger, self.incumbent)


def as_match(duel: Duel) -> Match:
    """What of a duel pairing needs."""
    return Match(duel.id, "trial" if duel.kind == "trial" else "watch", duel.challenger, duel.incumbent)


async def read_open(session: AsyncSession) -> Duel | None:
    """The duel that runs."""
    found: Duel | None = await session.scalar(select(Duel).where(Duel.ended_at.is_(None)))
    return found


async def begin(
    session: AsyncSession, kind: Kind, challenger: str, incumbent: str, votes_per_user: int
) -> Duel:
    """Begin a duel; one that still runs is stopped for it. votes_per_user: 0 lets the number of users decide."""
    running = await read_open(session)
    if running is not None:
        await end(session, running, "stopped", f"{challenger} is on trial now." if kind == "trial" else None)
    duel = Duel(
        kind=kind,
        challenger=challenger,
        incumbent=incumbent,
        votes_per_user=votes_per_user or await _choose_votes_per_user(session),
    )
    session.add(duel)
    await session.flush()
    return duel


async def _choose_votes_per_user(session: AsyncSession) -> int:
    """Many users stand for more of their kind: one vote of each, since two of one user are one taste, repeated. A few users
    are all there are, and all of their votes say what they like."""
    month = func.now() - func.make_interval(0, 0, 0, 30)
    voters = await session.scalar(select(func.count(Vote.user_id.distinct())).where(Vote.created_at > month))
    return 1 if (voters or 0) >= MANY_USERS else ALL_VOTES


async def end(session: AsyncSession, duel: Duel, outcome: Outcome, reason: str | None) -> None:
    """End a duel."""
    duel.outcome, duel.reason, duel.ended_at = outcome, reason, func.clock_timestamp()
    await session.flush()


COUNT = text(
    """
WITH counted AS (
    SELECT coalesce(blind.choice, votes.choice) AS choice, first.policy AS first,
        row_number() OVER (PARTITION BY votes.user_id ORDER BY votes.created_at, votes.id) AS nth
    FROM votes
    JOIN comparisons ON comparisons.id = votes.comparison_id
    JOIN comparison_replies AS shown ON shown.comparison_id = comparisons.id AND shown.position = 0
    JOIN replies AS first ON first.id = shown.reply_id
    LEFT JOIN LATERAL (
        SELECT content->>'choice' AS choice FROM feedback_events AS event
        WHERE event.comparison_id = votes.comparison_id AND event.user_id = votes.user_id
            AND event.kind = 'vote' AND event.action = 'given'
        ORDER BY event.id LIMIT 1
    ) AS blind ON true
    WHERE comparisons.duel_id = :duel_id
)
SELECT
    count(*) FILTER (WHERE choice = CASE WHEN first = :challenger THEN 'first' ELSE 'second' END) AS wins,
    count(*) FILTER (WHERE choice = CASE WHEN first = :challenger THEN 'second' ELSE 'first' END) AS losses,
    count(*) FILTER (WHERE choice IN ('tie', 'neither')) AS ties,
    count(*) FILTER (WHERE choice = 'first') AS chose_first
FROM counted WHERE nth <= :per_user
"""
)


@dataclass(frozen=True, slots=True)
class Count:
    """The votes of a duel that stand, each as it was first given: its answer names the policies, and what follows is not blind."""

    tally: Tally
    chose_first: int
    """Decided votes for the reply shown first: with a side bias, not half of them."""

    def as_dict(self) -> dict[str, Any]:
        """For the duel's row."""
        tally = self.tally
        return {
            "wins": tally.wins,
            "losses": tally.losses,
            "ties": tally.ties,
            "chose_first": self.chose_first,
        }


async def count(session: AsyncSession, duel: Duel) -> Count:
    """The first votes of each user."""
    row = (
        await session.execute(
            COUNT, {"duel_id": duel.id, "challenger": duel.challenger, "per_user": duel.votes_per_user}
        )
    ).one()
    return Count(Tally(row.wins, row.losses, row.ties), row.chose_first)
