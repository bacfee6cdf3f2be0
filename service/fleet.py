"""The replicas: which of them are healthy, which verified policies each holds, and where a request goes.

Holds no wish of its own: `reconciler.py` makes the fleet agree with the database. Used by `chat.py` to route.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service import metrics
from service.duels import Match
from service.engine import Engine
from service.errors import EngineUnavailable, PolicyRefused
from service.policies import BASE, Manifest
from service.tables import Deployment

HEALTH_SECONDS = 5.0
"""A replica that gave no token for so long is asked for one."""
MAX_PROBED_TOKENS = 48
"""Positions that one verification measures, spread evenly over the manifest's probe."""
PROBES_AT_ONCE = 4
"""Few, so that a verification does not push users' requests aside."""


class Replica:
    """One engine and what this process knows of it. Unhealthy and empty until looked at."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.healthy = False
        self.verified: set[str] = set()
        self.refused: dict[str, str] = {}
        """Why a policy could not be loaded or verified here."""
        self.running: Counter[str] = Counter()
        """Generations in flight, by policy."""
        self.context_tokens = 0
        self._alive_at = -math.inf

    def saw_token(self) -> None:
        """A token came: the engine works."""
        self._alive_at = time.monotonic()

    def fail(self) -> None:
        """It did not answer. Nothing goes to it, and everything on it is verified anew, until it does."""
        self.healthy = False
        self.verified.clear()
        self._alive_at = -math.inf
        metrics.REPLICA_HEALTHY.labels(self.engine.url).set(0)

    async def look(self) -> frozenset[str]:
        """Bring health and verified policies up to date; what the engine holds. Raises EngineUnavailable."""
        models = await self.engine.models()
        self.context_tokens = models.context_tokens
        self.verified &= models.names  # an adapter that is gone: the engine restarted
        if time.monotonic() - self._alive_at > HEALTH_SECONDS:
            await self.engine.complete_one(BASE)
            self.saw_token()
        self.verified.add(BASE)
        self.healthy = True
        metrics.REPLICA_HEALTHY.labels(self.engine.url).set(1)
        return models.names

    async def verify(self, policy: str, manifest: Manifest) -> None:
        """Accept a loaded policy that reproduces its probe. Raises PolicyRefused, EngineUnavailable."""
        gap = await self.probe_gap(policy, manifest)
        metrics.PROBE_GAP.labels(policy).set(gap)
        if not gap <= manifest.probe_tolerance:  # also for NaN
            raise PolicyRefused(
                f"the engine's log-probabilities differ from the manifest's by {gap:.3f} nats a token "
                f"(allowed: {manifest.probe_tolerance:.3f})"
            )
        self.verified.add(policy)
        self.refused.pop(policy, None)

    async def probe_gap(self, policy: str, manifest: Manifest) -> float:
        """Mean absolute difference to the manifest's log-probabilities, in nats a token."""
        places = [
            (probe.token_ids[:i], probe.token_ids[i], expected)
            for probe in manifest.probe
            for i, expected in enumerate(probe.logprobs)
            if i > 0 and expected is not None
        ]
        if not places:
            raise PolicyRefused("its probe holds no log-probability")
        places = places[:: math.ceil(len(places) / MAX_PROBED_TOKENS)]
        turns = asyncio.Semaphore(PROBES_AT_ONCE)

        async def gap(prefix: list[int], token: int, expected: float) -> float:
            async with turns:
                return abs(await self.engine.logprob(policy, prefix, token) - expected)

        return sum(await asyncio.gather(*(gap(*place) for place in places))) / len(places)


class Fleet:
    """All replicas."""

    def __init__(self, engines: list[Engine]) -> None:
        self.replicas = [Replica(engine) for engine in engines]
        self._deployment: Deployment | None = None
        """The pointer as the database last said; None until it has been read."""
        self.duel: Match | None = None
        """The duel that runs, as the database last said."""

    def policies(self) -> list[str]:
        """Names of the policies that can be asked for now, in order."""
        return sorted(set().union(*(replica.verified for replica in self.replicas if replica.healthy)))

    def context_tokens(self) -> int:
        """Longest prompt and reply together, in tokens; 0 while no replica has been seen."""
        return max(replica.context_tokens for replica in self.replicas)

    def live_policy(self) -> str:
        """The policy that answers. Raises EngineUnavailable while nobody knows."""
        if self._deployment is None:
            raise EngineUnavailable(
                "The service is starting. Try again in a moment.", code="engine_not_ready"
            )
        return self._deployment.live

    def match(self) -> Match | None:
        """The duel that can be shown now: it fits the pointer, and a replica is ready for each of the two."""
        duel, deployment = self.duel, self._deployment
        if duel is None or deployment is None or not duel.fits(deployment):
            return None
        ready = self.policies()
        return duel if {duel.challenger, duel.incumbent} <= set(ready) else None

    def point(self, deployment: Deployment) -> None:
        """Answer with its live policy from now on, unless a later change is known already."""
        known = self._deployment
        if known is None or deployment.changed_at >= known.changed_at:
            self._deployment = deployment
            metrics.show_policies(deployment)

    def route(self, policy: str) -> Replica:
        """The least busy healthy replica that has verified the policy. Raises EngineUnavailable."""
        able = [replica for replica in self.replicas if replica.healthy and policy in replica.verified]
        if not able:
            raise EngineUnavailable(
                f"No engine has {policy} ready. Try again in a moment.", code="engine_not_ready"
            )
        return min(able, key=lambda replica: replica.running.total())

    @contextmanager
    def lease(self, policy: str) -> Iterator[Replica]:
        """Route, and count the generation as in flight meanwhile: its policy is not unloaded under it."""
        replica = self.route(policy)
        replica.running[policy] += 1
        try:
            yield replica
        finally:
            replica.running[policy] -= 1
