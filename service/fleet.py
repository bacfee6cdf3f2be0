"""The replicas: which of them are healthy, which verified policies each holds, and where a request goes.

Holds no wish of its own: `reconciler.py` makes the fleet agree with the database. Used by `part.py` to route.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from service import metrics
from service.duels import Match
from service.engine import Engine
from service.errors import EngineUnavailable, NotReady, PolicyRefused
from service.policies import BASE, Manifest
from service.tables import Deployment

Connect = Callable[[str], Engine]
"""Makes the engine that an address is of."""
HEALTH_SECONDS = 5.0
"""A replica that gave no token for so long is asked for one."""
SILENT_SECONDS = 2.0
"""A replica that is asked for a token and gives none for so long is spared while there are others."""
MAX_PROBED_TOKENS = 48
"""Positions that one verification measures, spread evenly over the manifest's probe."""
HOLD_SECONDS = 10.0
"""How long new requests wait where no replica holds live, because the only one is getting other weights."""
HOLD_LOOK_SECONDS = 0.02
PROBES_AT_ONCE = 4
"""Few, so that a verification does not push users' requests aside."""
NOISE_FACTOR = 4.0
LEAST_TOLERANCE = 0.004
"""Nats a token. An adapter adds roundings of its own to the base's: a policy may be off by so many times what the base is off by in
the same engine at the same tokens. By chance an engine rounds the base as the trainer does, and then an adapter still otherwise: a
sound policy was off by .0025 where the base was by .0002. A policy's weights under its successor's name were off by .007 and more."""


class Place(NamedTuple):
    """A token to probe, and the log-probabilities that the manifest names."""

    prefix: list[int]
    token: int
    policy: float
    base: float


def _places(manifest: Manifest) -> list[Place]:
    """At most `MAX_PROBED_TOKENS`, spread evenly. Raises PolicyRefused where there are none."""
    places = [
        Place(probe.token_ids[:i], token, policy, base)
        for probe in manifest.probe
        for i, (token, policy, base) in enumerate(
            zip(probe.token_ids, probe.logprobs, probe.base_logprobs, strict=False)
        )
        if i > 0 and policy is not None and base is not None
    ]
    if not places:
        raise PolicyRefused("its probe holds no log-probability")
    return places[:: math.ceil(len(places) / MAX_PROBED_TOKENS)]


def _differ(what: str, gap: float, allowed: float) -> str:
    return (
        f"the engine's {what} differ from the manifest's by {gap:.4f} nats a token (allowed: {allowed:.4f})"
    )


class Replica:
    """One engine and what this process knows of it. Unhealthy and empty until looked at."""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url = url
        self.engine = engine
        self.healthy = False
        self.draining = False
        """It gets no new requests, and is kept ready."""
        self.switching = False
        """It gets no new requests, as its weights are being exchanged."""
        self.noise: float | None = None
        """By how much its log-probabilities differ from the trainer's for the same weights, nats a token: once measured."""
        self.removed = False
        self.verified: set[str] = set()
        self.refused: dict[str, str] = {}
        """Why a policy could not be loaded or verified here."""
        self.running: Counter[str] = Counter()
        """Generations in flight, by policy."""
        self.context_tokens = 0
        self._alive_at = -math.inf
        self._asked_at = math.inf
        """When it was asked for a token to show that it works; infinity: it is not being asked."""

    def saw_token(self) -> None:
        """A token came: the engine works."""
        self._alive_at = time.monotonic()

    def is_doubtful(self) -> bool:
        """Whether it failed a request and has given no token since, or owes one for long: it may hang while its HTTP answers."""
        silent_seconds = time.monotonic() - max(self._asked_at, self._alive_at)
        return self._alive_at == -math.inf or silent_seconds > SILENT_SECONDS

    def doubt(self) -> None:
        """It failed a request, which may be the request's fault. The next look asks it for a token."""
        self._alive_at = -math.inf

    def fail(self) -> None:
        """It did not answer. Nothing goes to it, and everything on it is verified anew, until it does."""
        self.verified.clear()
        self._alive_at = -math.inf
        self._set_healthy(False)

    async def look(self) -> frozenset[str]:
        """Bring health and verified policies up to date; what the engine holds. Raises EngineUnavailable.

        Where it is silent too, nobody is left waiting for what it was asked: the connection of an engine that hangs stays, and so does
        that of a machine that is gone.
        """
        began = time.monotonic()
        try:
            names = await self._ask()
        except EngineUnavailable:
            if self._alive_at < min(began, time.monotonic() - SILENT_SECONDS):
                self.engine.drop()
            raise
        self.verified |= {BASE} & names
        self._set_healthy(True)
        return names

    async def _ask(self) -> frozenset[str]:
        """What it holds, and a token, unless one came a moment ago."""
        models = await self.engine.models()
        self.context_tokens = models.context_tokens
        self.verified &= models.names  # an adapter that is gone: the engine restarted
        if time.monotonic() - self._alive_at > HEALTH_SECONDS:
            self._asked_at = time.monotonic()
            try:
                await self.engine.complete_one(BASE)
                self.saw_token()
            finally:
                self._asked_at = math.inf
        return models.names

    def _set_healthy(self, healthy: bool) -> None:
        self.healthy = healthy
        if not self.removed:
            metrics.REPLICA_HEALTHY.labels(self.url).set(healthy)

    async def verify(self, policy: str, manifest: Manifest) -> None:
        """Accept a loaded policy that reproduces its probe. Raises PolicyRefused, EngineUnavailable."""
        await self.measure_noise(manifest)
        await self.compare(policy, manifest)

    async def measure_noise(self, manifest: Manifest) -> None:
        """How exact an engine computes depends on its device and dtype, and is not guessed: it is what it is off by in the base, which
        it holds now, at the tokens of a policy's probe. Raises PolicyRefused where that is another base, EngineUnavailable.
        """
        noise = await self._gap(BASE, [(each.prefix, each.token, each.base) for each in _places(manifest)])
        if not noise <= manifest.probe_tolerance:  # also for NaN
            raise PolicyRefused(_differ("base's log-probabilities", noise, manifest.probe_tolerance))
        self.noise = noise

    async def compare(self, policy: str, manifest: Manifest) -> None:
        """Accept what is loaded, the manifest's policy or the base, where it gives its probe but for noise.

        Raises PolicyRefused, EngineUnavailable.
        """
        expected = [
            (each.prefix, each.token, each.base if policy == BASE else each.policy)
            for each in _places(manifest)
        ]
        gap = await self._gap(policy, expected)
        metrics.PROBE_GAP.labels(policy).set(gap)
        noise = math.inf if self.noise is None else self.noise
        allowed = min(manifest.probe_tolerance, max(LEAST_TOLERANCE, NOISE_FACTOR * noise))
        if not gap <= allowed:
            raise PolicyRefused(_differ("log-probabilities", gap, allowed))
        self.verified.add(policy)
        self.refused.pop(policy, None)

    async def _gap(self, policy: str, places: Sequence[tuple[list[int], int, float]]) -> float:
        """Mean absolute difference to what is expected of (prefix, token), in nats a token."""
        turns = asyncio.Semaphore(PROBES_AT_ONCE)

        async def gap(prefix: list[int], token: int, expected: float) -> float:
            async with turns:
                return abs(await self.engine.logprob(policy, prefix, token) - expected)

        return sum(await asyncio.gather(*(gap(*place) for place in places))) / len(places)


class Fleet:
    """All replicas that are wanted."""

    def __init__(self, connect: Connect, urls: Sequence[str], *, exchanges_weights: bool = False) -> None:
        """exchanges_weights: a replica holds one policy at a time (merged delivery)."""
        self.exchanges_weights = exchanges_weights
        self._connect = connect
        self.replicas: list[Replica] = []
        self.num_followed = 0
        """How often it was told what to be made of: who read that before the last time may have read something older."""
        self.follow(dict.fromkeys(urls, "serving"))
        self._deployment: Deployment | None = None
        """The pointer as the database last said; None until it has been read."""
        self._answers = ""
        """The policy that this process answers with."""
        self.duel: Match | None = None
        """The duel that runs, as the database last said."""

    def follow(self, wanted: Mapping[str, str]) -> None:
        """Be made of these replicas; by address, `serving` or `draining`. One that is left out ends the requests that it has."""
        self.num_followed += 1
        known = {replica.url: replica for replica in self.replicas}
        self.replicas = [known.get(url) or Replica(url, self._connect(url)) for url in wanted]
        for replica in self.replicas:
            replica.draining = wanted[replica.url] == "draining"
        for url in known.keys() - wanted.keys():
            known[url].removed = True
            metrics.forget_replica(url)

    def retire(self) -> None:
        """Answer nobody: another process does."""
        for replica in self.replicas:
            replica.fail()

    def serving(self) -> list[Replica]:
        """Those that can get requests now."""
        return [each for each in self.replicas if each.healthy and not each.draining and not each.switching]

    def policies(self) -> list[str]:
        """Names of the policies that can be asked for now, in order."""
        return sorted(set().union(*(replica.verified for replica in self.serving())))

    def context_tokens(self) -> int:
        """Longest prompt and reply together, in tokens; 0 while no replica has been seen."""
        return max((replica.context_tokens for replica in self.replicas), default=0)

    def live_policy(self) -> str:
        """The policy that answers. Raises NotReady while nobody knows.

        Each process verifies for itself: where another one was faster and moved the pointer, this one goes on as before until it is
        ready.
        """
        if self._deployment is None:
            raise NotReady("The service is starting. Try again in a moment.")
        live = self._deployment.live
        if self._is_ready(live) or not self._is_ready(self._answers):
            self._answers = live
        return self._answers

    def _is_ready(self, policy: str) -> bool:
        return any(policy in replica.verified for replica in self.serving())

    async def settled(self) -> bool:
        """Whether live can be asked of somebody; while weights are being exchanged that is waited for, up to `HOLD_SECONDS`."""
        patience = time.monotonic() + HOLD_SECONDS
        while not self._is_ready(self.live_policy()):
            awaited = self.exchanges_weights and any(replica.healthy for replica in self.replicas)
            if not awaited or time.monotonic() > patience:
                return False
            await asyncio.sleep(HOLD_LOOK_SECONDS)
        return True

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
            if known is not None:
                self.live_policy()  # what it answers with until the new one is ready, also where nobody has asked yet
            self._deployment = deployment
            metrics.show_policies(deployment)

    def route(self, policy: str, tried: Collection[Replica] = ()) -> Replica:
        """The least busy one that can get requests, has verified the policy, and was not tried yet. Raises NotReady."""
        able = [replica for replica in self.serving() if policy in replica.verified and replica not in tried]
        if not able:
            raise NotReady(f"No engine has {policy} ready. Try again in a moment.")
        return min(able, key=lambda replica: (replica.is_doubtful(), replica.running.total()))

    @contextmanager
    def lease(self, policy: str, tried: Collection[Replica] = ()) -> Iterator[Replica]:
        """Route, and count the generation as in flight meanwhile: its policy is not unloaded under it."""
        replica = self.route(policy, tried)
        replica.running[policy] += 1
        try:
            yield replica
        finally:
            replica.running[policy] -= 1
