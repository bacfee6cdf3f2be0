"""Merged delivery: which policy each replica should hold, and exchanging its weights without a request noticing.

An engine holds one policy at a time here, so the replicas are shared out: one holds the policy that live is compared with, where there
is such a one and a replica to spare; the others hold live. One replica at a time is drained, given other weights, probed, and rejoins;
where none is left to answer meanwhile, new requests wait (`Fleet.settled`). Run by the leader alone, who alone gives answers: whoever
drains a replica must know of every request that it has.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from service import metrics
from service.errors import PolicyRefused
from service.fleet import Replica
from service.policies import BASE, MERGED, Manifest, Wanted

log = logging.getLogger("ratchet.exchanger")
DRAIN_LOOK_SECONDS = 0.01


def share_out(held: Mapping[str, str | None], live: str, other: str | None) -> dict[str, str]:
    """The policy that each replica should hold. held: what it holds, by address; other: what live is compared with.

    Whoever holds it already goes on; a replica alone is live's.
    """
    if other is None or len(held) < 2:
        return dict.fromkeys(held, live)
    chosen = next((url for url, policy in held.items() if policy == other), list(held)[-1])
    return {url: other if url == chosen else live for url in held}


class Exchanger:
    """Gives replicas other weights, one at a time."""

    def __init__(self, manifest: Callable[[Wanted], Awaitable[Manifest]]) -> None:
        self._manifest = manifest
        self._turn = asyncio.Lock()
        self._known: Manifest | None = None
        """The last one that was read: its probe tells of the base too."""

    async def agree(self, replica: Replica, target: Wanted) -> None:
        """Have a replica, which has just been looked at, hold the target.

        Raises PolicyRefused, with the replica ready for nothing then, and EngineUnavailable.
        """
        if target.name in replica.verified:
            return
        # Read before anything is drained: a large model's files take long.
        manifest = await self._manifest(target) if target.name != BASE else None
        async with self._turn:
            replica.switching = True
            try:
                while replica.running.total():  # each request has a deadline of its own
                    await asyncio.sleep(DRAIN_LOOK_SECONDS)
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
