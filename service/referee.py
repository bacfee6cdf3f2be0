"""Decides duels by the users' votes: who goes live, who is rejected, who is taken back. One leader at a time runs it.

A challenger that every replica has verified goes on trial against live. It goes live once the votes prove it better; it is
rejected once they prove it worse, or when votes or time run out. Then it is watched against the policy before it, and taken
back by itself once the votes prove it worse. Votes or not, it is worse where, side by side with the other, its replies fail, are cut
off, or are far too long or slow, and the other's are not.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service import duels, metrics, policies
from service.duel import Rules, Tally, decide, log_evidence
from service.duels import Outcome
from service.settings import Settings
from service.tables import Deployment, Duel, Policy

log = logging.getLogger("ratchet.referee")


class Referee:
    """One per service process; the reconciler's leader asks it at every look."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], settings: Settings) -> None:
        self._sessions = sessions
        self._settings = settings

    async def look(self, verified: str | None, term: int) -> Deployment | None:
        """One look at the votes. verified: a challenger that every replica has verified, if there is one. term: the leader's.

        Returns the pointer where it moved. Raises LeadLost.
        """
        async with self._sessions.begin() as session:
            deployment = await policies.lock_as_leader(session, term)
            running = await duels.read_open(session)
            if running is not None and not duels.as_match(running).fits(deployment):
                await duels.end(
                    session, running, "stopped", "Another policy went live, or the trial was ended."
                )
                running = None
            if verified is not None and verified == deployment.challenger:
                if self._settings.duel_votes == 0:
                    return await self._promote(session, verified)
                if running is None or running.kind != "trial":
                    await self._begin_trial(session, deployment, verified)
                    return deployment
            if running is None or (running.kind == "trial" and verified != running.challenger):
                return None  # nobody goes live whom a replica does not hold just now
            return await self._decide(session, running)

    async def _begin_trial(self, session: AsyncSession, deployment: Deployment, challenger: str) -> None:
        policy = await session.get_one(Policy, challenger)
        policy.state = "verified"
        await duels.begin(session, "trial", challenger, deployment.live, self._settings.duel_votes_per_user)
        log.info("%s is on trial against %s", challenger, deployment.live)

    async def _decide(self, session: AsyncSession, duel: Duel) -> Deployment | None:
        settings = self._settings
        counted = await duels.count(session, duel)
        rules = Rules(max(1, settings.duel_votes), settings.duel_error, settings.duel_error)
        verdict = decide(counted.tally, rules)
        guards = await duels.count_guards(session, duel)
        now = counted.as_dict() | asdict(verdict) | {"guards": guards}
        if duel.metrics != now:
            duel.metrics = now
        outcome: Outcome | None = verdict.outcome
        reason = _votes_reason(duel, counted.tally, outcome)
        if fault := _find_fault(guards, settings.duel_error):
            outcome, reason = "worse", fault
        if outcome is None and await self._is_overdue(session, duel):
            outcome = "undecided"
        if outcome is None:
            return None
        await duels.end(session, duel, outcome, reason)
        metrics.DUELS.labels(duel.kind, outcome).inc()
        log.info("%s of %s: %s; %s", duel.kind, duel.challenger, outcome, reason)
        return await self._act(session, duel, outcome, reason)

    async def _is_overdue(self, session: AsyncSession, duel: Duel) -> bool:
        limit = timedelta(hours=self._settings.duel_hours)
        return bool(await session.scalar(select(func.clock_timestamp() - duel.created_at > limit)))

    async def _act(
        self, session: AsyncSession, duel: Duel, outcome: Outcome, reason: str
    ) -> Deployment | None:
        if duel.kind == "trial":
            if outcome == "better":
                return await self._promote(session, duel.challenger)
            return await policies.reject(session, duel.challenger, reason)
        if outcome == "worse":
            metrics.ROLLBACKS.inc()
            return await policies.roll_back(session, because=reason)
        return None

    async def _promote(self, session: AsyncSession, challenger: str) -> Deployment | None:
        deployment = await policies.promote(session, challenger)
        if deployment is None:
            return None
        metrics.SWAPS.labels("promoted").inc()
        log.info("%s is live", challenger)
        await duels.watch(session, deployment, self._settings)
        return deployment


def _votes_reason(duel: Duel, tally: Tally, outcome: Outcome | None) -> str:
    proven = {"better": "prove it better", "worse": "prove it worse"}.get(
        outcome or "", "do not prove it better"
    )
    return (
        f"the votes {proven}: {tally.wins} votes for {duel.challenger}, {tally.losses} for {duel.incumbent}, "
        f"{tally.ties} for neither."
    )


def _find_fault(guards: Mapping[str, Sequence[int]], error: float) -> str | None:
    """What the challenger's replies do too often, by the same test as the votes', each guard with its share of the error."""
    for name, (challenger, incumbent) in guards.items():
        if log_evidence(challenger, incumbent) >= math.log(len(guards) / error):
            return (
                f"of two replies side by side its own {duels.GUARDS[name]} {challenger} times, and the other one "
                f"{incumbent} times."
            )
    return None
