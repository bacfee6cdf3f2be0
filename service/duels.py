"""The record of duels: begun, counted and ended, a transaction each. What a tally proves is `duel.py`'s to say.

Used by the referee, who decides, and by the fleet, which shows a duel to whoever pairs replies.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from service.duel import Tally
from service.settings import Settings
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
        now = "is on trial" if kind == "trial" else "is live"
        await end(session, running, "stopped", f"{challenger} {now} now.")
    duel = Duel(
        kind=kind,
        challenger=challenger,
        incumbent=incumbent,
        votes_per_user=votes_per_user or await _choose_votes_per_user(session),
    )
    session.add(duel)
    await session.flush()
    return duel


async def watch(session: AsyncSession, deployment: Deployment, settings: Settings) -> None:
    """Go on comparing what has gone live, by whomever, with the policy before it, unless the settings say not to."""
    wanted = settings.duel_votes > 0 and settings.watch_share > 0
    if wanted and deployment.previous is not None:
        await begin(session, "watch", deployment.live, deployment.previous, settings.duel_votes_per_user)


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


# The subqueries keep the planner from reading all votes for those of one duel.
COUNTED = """
WITH counted AS (
    SELECT votes.id, votes.created_at, coalesce(blind.choice, votes.choice) AS choice, first.policy AS first,
        row_number() OVER (PARTITION BY votes.user_id ORDER BY votes.created_at, votes.id) AS nth
    FROM comparisons
    CROSS JOIN LATERAL (SELECT * FROM votes WHERE comparison_id = comparisons.id OFFSET 0) AS votes
    CROSS JOIN LATERAL (
        SELECT policy FROM replies WHERE id = (
            SELECT reply_id FROM comparison_replies WHERE comparison_id = comparisons.id AND position = 0
        ) LIMIT 1
    ) AS first
    LEFT JOIN LATERAL (
        SELECT content->>'choice' AS choice FROM feedback_events AS event
        WHERE event.comparison_id = votes.comparison_id AND event.user_id = votes.user_id
            AND event.kind = 'vote' AND event.action = 'given'
        ORDER BY event.id LIMIT 1
    ) AS blind ON true
    WHERE comparisons.duel_id = :duel_id
)
"""
COUNT = text(
    COUNTED
    + """
SELECT
    count(*) FILTER (WHERE choice = CASE WHEN first = :challenger THEN 'first' ELSE 'second' END) AS wins,
    count(*) FILTER (WHERE choice = CASE WHEN first = :challenger THEN 'second' ELSE 'first' END) AS losses,
    count(*) FILTER (WHERE choice IN ('tie', 'neither')) AS ties,
    count(*) FILTER (WHERE choice = 'first') AS chose_first
FROM counted WHERE nth <= :per_user
"""
)
COURSE = text(
    COUNTED
    + """
SELECT created_at, CASE choice WHEN 'tie' THEN 0 WHEN 'neither' THEN 0
    WHEN CASE WHEN first = :challenger THEN 'first' ELSE 'second' END THEN 1 ELSE -1 END AS result
FROM counted WHERE nth <= :per_user ORDER BY created_at, id
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
    row = (await session.execute(COUNT, _names(duel))).one()
    return Count(Tally(row.wins, row.losses, row.ties), row.chose_first)


async def read_course(session: AsyncSession, duel: Duel) -> list[tuple[datetime, Tally]]:
    """The tally after each vote that counts, in the order that they were given."""
    wins = losses = ties = 0
    course = []
    for row in await session.execute(COURSE, _names(duel)):
        wins, losses, ties = wins + (row.result > 0), losses + (row.result < 0), ties + (row.result == 0)
        course.append((row.created_at, Tally(wins, losses, ties)))
    return course


def _names(duel: Duel) -> dict[str, Any]:
    return {"duel_id": duel.id, "challenger": duel.challenger, "per_user": duel.votes_per_user}


GUARDED = text(
    """
WITH pairs AS (
    SELECT new.finish_reason AS new_end, old.finish_reason AS old_end,
        new.completion_tokens AS new_tokens, old.completion_tokens AS old_tokens,
        extract(epoch FROM new.ended_at - new.created_at) AS new_seconds,
        extract(epoch FROM old.ended_at - old.created_at) AS old_seconds
    FROM comparisons
    JOIN comparison_replies AS shown ON shown.comparison_id = comparisons.id
    JOIN replies AS new ON new.id = shown.reply_id AND new.policy = :challenger
    JOIN comparison_replies AS beside ON beside.comparison_id = comparisons.id
    JOIN replies AS old ON old.id = beside.reply_id AND old.policy = :incumbent
    WHERE comparisons.duel_id = :duel_id
        AND new.finish_reason IN ('stop', 'length', 'error') AND old.finish_reason IN ('stop', 'length', 'error')
)
SELECT
    count(*) FILTER (WHERE new_end = 'error' AND old_end <> 'error') AS new_failed,
    count(*) FILTER (WHERE old_end = 'error' AND new_end <> 'error') AS old_failed,
    count(*) FILTER (WHERE new_end = 'length' AND old_end = 'stop') AS new_cut_off,
    count(*) FILTER (WHERE old_end = 'length' AND new_end = 'stop') AS old_cut_off,
    count(*) FILTER (WHERE new_tokens > 4 * old_tokens) AS new_long,
    count(*) FILTER (WHERE old_tokens > 4 * new_tokens) AS old_long,
    count(*) FILTER (WHERE new_seconds > 4 * old_seconds + 1) AS new_slow,
    count(*) FILTER (WHERE old_seconds > 4 * new_seconds + 1) AS old_slow
FROM pairs
"""
)
GUARDS = {
    "failed": "failed",
    "cut_off": "was cut off",
    "long": "was more than four times as long",
    "slow": "took more than four times as long, and a second",
}
"""What a reply can do that the one beside it did not, whatever people say of it."""


async def count_guards(session: AsyncSession, duel: Duel) -> dict[str, list[int]]:
    """How often it was the challenger's reply alone, and how often the incumbent's, of all pairs that were shown."""
    names = {"duel_id": duel.id, "challenger": duel.challenger, "incumbent": duel.incumbent}
    row = (await session.execute(GUARDED, names)).one()._mapping
    return {name: [row[f"new_{name}"], row[f"old_{name}"]] for name in GUARDS}
