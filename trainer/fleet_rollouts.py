"""PPO's replies from the engines that serve users: by an adapter that is loaded for one iteration, while users go first.

For `ppo.py`, in the process that leads. Every replica is given the policy's adapter under a name that is never used again (nor is
one that the service would see to), is asked for replies at low priority, and forgets it. An engine takes users' requests first; but
what it already works on slows them down too, so while there are users each engine is given few of ours at once.

A replica that fails is left out for the rest of the iteration, and what it owed is asked of another. What none has answered is
for the trainer to sample.
"""

import asyncio
import math
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import aiohttp

from service.engine import Engine, VllmEngine, engine_connector
from service.errors import EngineUnavailable, PolicyRefused
from trainer.models import Roles
from trainer.publish import save_adapter
from trainer.rollouts import Rollout, Sampler

PREFIX = "rollouts-"
"""Of the adapters' names, and of their folders'. What is called so when an iteration begins was left by a run that was killed."""
PRIORITY = 10
"""Users' requests have 0, and go first."""
AT_ONCE = 32
"""Replies that a replica is asked for at once. On two cores twice as many gave no more."""
AT_ONCE_BESIDE_USERS = 1
"""The same while there are users."""
QUIET_SECONDS = 30.0
"""There are users until nobody has asked for so long: a reply takes a while, and so does reading it."""
LOOK_SECONDS = 0.5
"""How often it is asked whether there are users."""
PREPARE_SECONDS = 30.0
"""For a replica to load the adapter and give a token by it, while the others wait; one that takes longer is left out."""
PATIENCE_SECONDS = 300.0
"""For an iteration: what has not come by then the trainer samples, however many users there are."""

Connect = Callable[[str, aiohttp.ClientSession], Engine]
"""The engine at an address."""


class FleetSampler:
    """Samples from whichever replicas there are when it is asked."""

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        idle_seconds: Callable[[], float],
        folder: Path,
        say: Callable[[str], None],
        connect: Connect = VllmEngine,
    ) -> None:
        """addresses: of the replicas that serve. idle_seconds: since a user last asked something. folder: the cycle's, which engines
        can read. say: one line for people."""
        self._addresses = addresses
        self._idle_seconds = idle_seconds
        self._folder = folder
        self._say = say
        self._connect = connect

    def sample(self, roles: Roles, prompts: Sequence[list[int]], sampler: Sampler) -> list[Rollout | None]:
        """One reply of the policy to each prompt, in the order given; None where no replica gave one."""
        assert (sampler.temperature, sampler.min_p) == (1.0, 0.0)  # of which engines tell log-probabilities
        for leftover in self._folder.glob(f"{PREFIX}*"):
            shutil.rmtree(leftover)
        name = f"{PREFIX}{self._folder.name}-{secrets.token_hex(8)}"
        adapter = self._folder.resolve() / name
        try:
            save_adapter(roles, adapter)
            return asyncio.run(self._sample(name, adapter, prompts, sampler))
        finally:
            shutil.rmtree(adapter, ignore_errors=True)

    async def _sample(
        self, name: str, adapter: Path, prompts: Sequence[list[int]], sampler: Sampler
    ) -> list[Rollout | None]:
        async with aiohttp.ClientSession(connector=engine_connector()) as session:
            replicas = [_Replica(self._connect(url, session)) for url in self._addresses()]
            try:
                await asyncio.gather(*(replica.prepare(name, adapter) for replica in replicas))
                found = await _Round(replicas, name, sampler, self._idle_seconds).ask(prompts)
            finally:
                await asyncio.gather(*(replica.unload(name) for replica in replicas))
        self._report(found, replicas)
        return found

    def _report(self, found: Sequence[Rollout | None], replicas: Sequence["_Replica"]) -> None:
        """What did not go as it should."""
        missing = found.count(None)
        failed = [f"{replica.engine.url}: {replica.failure}" for replica in replicas if replica.failure]
        if missing or failed:
            why = "; ".join(failed) or "no engine had the room or the time for them"
            self._say(f"{missing} of {len(found)} rollouts are sampled by the trainer itself ({why})")


class _Replica:
    """One engine in one iteration."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure = ""
        """Why it is left out; empty while it is not."""
        self.context_tokens = 0
        self.running = 0
        """Replies that it is asked for now."""

    async def prepare(self, name: str, adapter: Path) -> None:
        """Loads the adapter, and forgets what a run that was killed has left."""
        try:
            async with asyncio.timeout(PREPARE_SECONDS):
                models = await self.engine.models()
                for leftover in sorted(models.names):
                    if leftover.startswith(PREFIX):
                        await self.engine.unload(leftover)
                await self.engine.load(name, str(adapter))
                await self.engine.complete_one(name)
            self.context_tokens = models.context_tokens
        except (EngineUnavailable, PolicyRefused) as error:
            self.failure = error.message
        except TimeoutError:
            self.failure = f"It was not ready within {PREPARE_SECONDS:.0f} s."

    async def unload(self, name: str) -> None:
        with suppress(EngineUnavailable):
            await self.engine.unload(name)


class _Round:
    """An iteration's prompts, asked of replicas that have the adapter."""

    def __init__(
        self, replicas: Sequence[_Replica], name: str, sampler: Sampler, idle_seconds: Callable[[], float]
    ) -> None:
        self._replicas = replicas
        self._name = name
        self._sampler = sampler
        self._idle_seconds = idle_seconds
        self._looked_at = -math.inf
        self._at_once = AT_ONCE_BESIDE_USERS
        self._answered = asyncio.Condition()
        """Or failed: somebody's turn may have come."""

    async def ask(self, prompts: Sequence[list[int]]) -> list[Rollout | None]:
        """As `FleetSampler.sample`. What is still under way when patience ends is aborted. An error of our own ends it at once."""
        if not prompts:
            return []
        tasks = [asyncio.create_task(self._reply(prompt)) for prompt in prompts]
        try:
            done, _ = await asyncio.wait(tasks, timeout=PATIENCE_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() if task in done else None for task in tasks]

    async def _reply(self, prompt: list[int]) -> Rollout | None:
        """By one replica after the other, until one gives it."""
        room = min(self._sampler.max_tokens, self._sampler.context_tokens - len(prompt))
        if room < 1:
            return None
        while (replica := await self._take_turn(len(prompt) + room)) is not None:
            try:
                completion = await replica.engine.complete(
                    self._name,
                    prompt,
                    max_tokens=room,
                    end_ids=self._sampler.end_ids,
                    priority=PRIORITY,
                )
                ended = completion.token_ids[-1] in self._sampler.end_ids
                return Rollout(prompt, completion.token_ids, completion.logprobs, ended)
            except EngineUnavailable as error:
                replica.failure = error.message
            finally:
                replica.running -= 1
                async with self._answered:
                    self._answered.notify_all()
        return None

    async def _take_turn(self, num_tokens: int) -> _Replica | None:
        """With the replica that is asked least now; waits for it. None where none is left, or none has such a context."""

        def least_asked() -> _Replica | None:
            able = [each for each in self._replicas if not each.failure and each.context_tokens >= num_tokens]
            return min(able, key=lambda each: each.running, default=None)

        async with self._answered:
            while (chosen := least_asked()) is not None and chosen.running >= self._most_now():
                await self._answered.wait()
            if chosen is not None:
                chosen.running += 1
            return chosen

    def _most_now(self) -> int:
        """Replies that a replica may be asked for at once."""
        if time.monotonic() >= self._looked_at + LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self._at_once = AT_ONCE if self._idle_seconds() >= QUIET_SECONDS else AT_ONCE_BESIDE_USERS
        return self._at_once
