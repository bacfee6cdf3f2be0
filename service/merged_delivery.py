"""Merged delivery: an engine holds one policy at a time, and its weights are exchanged without a request noticing.

So the replicas are shared out: one holds the policy that live is compared with, where there is such a one and a replica to spare; the
others hold live. One replica at a time is drained, given other weights, probed, and rejoins; where none is left to answer meanwhile,
new requests wait (`Fleet.settled`). Only the leader does so, who alone gives answers: whoever drains a replica must know of every
request that it has.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service import metrics, policies
from service.delivery import Delivery, SeeTo, give_up
from service.errors import EngineUnavailable, PolicyRefused
from service.fleet import Fleet, Replica
from service.policies import BASE, MERGED, Manifest, Wanted
from service.tables import Deployment

log = logging.getLogger("ratchet.delivery")
DRAIN_LOOK_SECONDS = 0.01
ONE_REPLICA = "with merged delivery a trial needs two replicas: add one, or set RATCHET_DUEL_VOTES=0"


def share_out(held: Mapping[str, str | None], live: str, other: str | None) -> dict[str, str]:
    """The policy that each replica should hold. held: what it holds, by address; other: what live is compared with.

    Whoever holds it already goes on; a replica alone is live's.
    """
    if other is None or len(held) < 2:
        return dict.fromkeys(held, live)
    chosen = next((url for url, policy in held.items() if policy == other), list(held)[-1])
    return {url: other if url == chosen else live for url in held}


class MergedDelivery(Delivery):
    """Replicas that hold different policies."""

    merged = True

    def __init__(self, fleet: Fleet, sessions: async_sessionmaker[AsyncSession], duel_votes: int) -> None:
        """duel_votes: `RATCHET_DUEL_VOTES`; 0 where nothing is put on trial."""
        super().__init__(fleet)
        self._sessions = sessions
        self._duel_votes = duel_votes
        self._last_term: int | None = None
        """In which this process led."""
        self._shares: dict[str, Wanted] = {}
        """What each replica should hold, by address, when the database was last asked; nothing where another process leads."""
        self._turn = asyncio.Lock()
        self._known: Manifest | None = None
        """The last one that was read: its probe tells of the base too."""

    def plan(self, deployment: Deployment, wanted: list[Wanted], term: int | None) -> SeeTo | None:
        if term is None:
            if deployment.leader_term != self._last_term:
                self._shares = {}
                self._fleet.retire()  # nobody else led since where it is the same: the lock's connection was lost
            return None
        if term != self._last_term:
            for replica in self._fleet.replicas:
                replica.engine.forget()  # others may have led meanwhile
        self._last_term = term
        self._shares = self._share_out(deployment, wanted)
        return lambda replica: self._agree(replica, self._shares.get(replica.url), term)

    def is_ready(self, challenger: str) -> bool:
        return any(challenger in replica.verified for replica in self._fleet.serving())

    def objection(self, challenger: str) -> str | None:
        staying = [replica for replica in self._fleet.replicas if not replica.draining]
        return ONE_REPLICA if self._duel_votes and len(staying) == 1 else super().objection(challenger)

    def _share_out(self, deployment: Deployment, wanted: list[Wanted]) -> dict[str, Wanted]:
        """What each replica that can be given weights should hold."""
        by_name = {policy.name: policy for policy in wanted}
        able = [replica for replica in self._fleet.replicas if replica.healthy and not replica.draining]
        compared = deployment.challenger
        if compared is None and self._fleet.duel is not None:
            compared = deployment.previous
        if compared is not None and any(compared in replica.refused for replica in able):
            compared = None
        if len(able) == 1 and compared == deployment.challenger and self._duel_votes == 0:
            return {able[0].url: by_name[compared or deployment.live]}
        held = {replica.url: next(iter(replica.verified), None) for replica in able}
        return {url: by_name[name] for url, name in share_out(held, deployment.live, compared).items()}

    async def _agree(self, replica: Replica, target: Wanted | None, term: int) -> None:
        """Look at one replica, and have it hold the target. Without one it has not been looked at yet, or is to go."""
        try:
            await replica.look()
            if target is not None and target.name not in replica.verified:
                await self._bring(replica, target, term)
        except EngineUnavailable as error:
            give_up(replica, error)

    async def _bring(self, replica: Replica, target: Wanted, term: int) -> None:
        """Drain a replica and have it hold the target, noting why that was refused: it is ready for nothing then."""
        if self._is_put_off(replica, target):
            return
        try:
            # Read before anything is drained: a large model's files take long.
            manifest = await self._manifest(target) if target.name != BASE else None
            async with self._turn:
                await self._drain_and_exchange(replica, target, manifest, term)
        except PolicyRefused as error:
            self._note_refused(replica, target, error)

    async def _drain_and_exchange(
        self, replica: Replica, target: Wanted, manifest: Manifest | None, term: int
    ) -> None:
        """Does nothing, or no more, where something else is wanted by now. Raises LeadLost, PolicyRefused, EngineUnavailable."""
        if self._shares.get(replica.url) != target:  # it may have waited long for its turn
            return
        replica.switching = True
        try:
            while replica.running.total():  # each request has a deadline of its own
                await asyncio.sleep(DRAIN_LOOK_SECONDS)
            if self._shares.get(replica.url) != target:
                return
            async with self._sessions.begin() as session:
                await policies.lock_as_leader(session, term)
            await self._exchange(replica, target, manifest)
        except PolicyRefused:
            await replica.engine.unload(target.name)
            raise
        finally:
            replica.switching = False

    async def _exchange(self, replica: Replica, target: Wanted, manifest: Manifest | None) -> None:
        started = time.monotonic()
        self._known = manifest or self._known
        held = (await replica.engine.models()).names
        replica.verified.clear()
        if self._known is not None and (BASE in held or replica.noise is None):
            if BASE not in held:
                await replica.engine.load(BASE, target.base)
                held = frozenset({BASE})
            await replica.measure_noise(self._known)
        if target.name not in held:
            await replica.engine.load(target.name, _whole(target))
        if self._known is None:
            replica.verified.add(BASE)  # there is nothing else yet that it could hold
        else:
            await replica.compare(target.name, self._known)
        metrics.LOAD_SECONDS.observe(time.monotonic() - started)
        log.info("%s loaded and verified on %s", target.name, replica.url)


def _whole(policy: Wanted) -> str:
    """Folder of a policy's whole model."""
    return policy.path if policy.name == BASE else str(Path(policy.path) / MERGED)
