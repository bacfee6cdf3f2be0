"""Adapter delivery: each replica holds all policies that are wanted, side by side, each loaded and verified under its own name.

Every service process does so for itself, as both can be repeated safely; only the leader unloads.
"""

import logging
import re
import time

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service import metrics, policies
from service.delivery import Delivery, SeeTo, give_up
from service.errors import EngineUnavailable, PolicyRefused
from service.fleet import Fleet, Replica
from service.policies import Wanted
from service.tables import Deployment

log = logging.getLogger("ratchet.delivery")
OURS = re.compile(r"policy-\d{6}")
"""Names that may be unloaded; the trainer loads others for its rollouts."""


class AdapterDelivery(Delivery):
    """Replicas that are all alike."""

    merged = False

    def __init__(self, fleet: Fleet, sessions: async_sessionmaker[AsyncSession]) -> None:
        super().__init__(fleet)
        self._sessions = sessions

    def plan(self, deployment: Deployment, wanted: list[Wanted], term: int | None) -> SeeTo:
        return lambda replica: self._agree(replica, wanted, term)

    def is_ready(self, challenger: str) -> bool:
        serving = self._fleet.serving()
        return bool(serving) and all(challenger in replica.verified for replica in serving)

    async def _agree(self, replica: Replica, wanted: list[Wanted], term: int | None) -> None:
        """Load and verify what is missing on one replica; the leader also unloads what nobody wants."""
        try:
            held = await replica.look()
            unwanted = {name for name in held if OURS.fullmatch(name)} - _names(wanted)
            if unwanted and term is not None:
                await self._unload(replica, unwanted, term)
            for policy in wanted:
                if policy.name not in replica.verified and not self._is_put_off(replica, policy):
                    await self._bring(replica, policy)
        except EngineUnavailable as error:
            give_up(replica, error)

    async def _unload(self, replica: Replica, unwanted: set[str], term: int) -> None:
        """Unload what still is unwanted: it may have been a while since the database was asked. Raises LeadLost."""
        async with self._sessions.begin() as session:
            await policies.lock_as_leader(session, term)
            _, wanted = await policies.wanted(session)
        for name in sorted(unwanted - _names(wanted)):
            if not replica.running[name]:
                replica.verified.discard(name)  # first, so that nothing is routed to it any more
                await replica.engine.unload(name)
                log.info("%s unloaded from %s", name, replica.url)

    async def _bring(self, replica: Replica, policy: Wanted) -> None:
        """Load and verify one policy on one replica, noting why it was refused."""
        started = time.monotonic()
        try:
            manifest = await self._manifest(policy)
            await replica.engine.load(policy.name, policy.path)
            await replica.verify(policy.name, manifest)
        except PolicyRefused as error:
            self._note_refused(replica, policy, error)
        else:
            metrics.LOAD_SECONDS.observe(time.monotonic() - started)
            log.info("%s loaded and verified on %s", policy.name, replica.url)


def _names(wanted: list[Wanted]) -> set[str]:
    return {policy.name for policy in wanted}
