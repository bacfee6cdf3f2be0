"""PPO's replies from the engines that serve users: by an adapter that is loaded for one iteration, while users go first.

For `ppo.py`, in the process that leads. Every replica is given the policy's adapter under a name that is never used again (nor is
one that the service would see to), is asked for replies at low priority, and forgets it. An engine takes users' requests first; but
what it already works on slows them down too, so while it has users it is given few of ours at once.

A replica that fails is left out for the rest of the iteration, and what it owed is asked of another. What none has answered is
for the trainer to sample.
"""

import asyncio
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import aiohttp

from service.engine import Completion, Engine, VllmEngine, engine_connector
from service.errors import EngineUnavailable, PolicyRefused
from trainer.models import Roles
from trainer.publish import save_adapter
from trainer.rollouts import Rollout, Sampler

PREFIX = "rollouts-"
"""Of the adapters' names, and of their folders'. Whatever is called so when an iteration begins was left by one that was killed."""
PRIORITY = 10
"""Users' requests have 0, and go first."""
AT_ONCE = 32
"""Replies that one replica is asked for at once; more gain little, and are in users' way for as long as they take."""
AT_ONCE_BESIDE_USERS = 1
"""The same while it has users, and for `QUIET_SECONDS` after: with 32 in eight requests users' replies took 2.5 times as long."""
LOOK_SECONDS = 0.5
"""How often each replica is asked whether it has users."""
QUIET_SECONDS = 5.0
"""Somebody who has just read a reply may ask again."""
PATIENCE_SECONDS = 300.0
"""For an iteration: what has not come by then the trainer samples, however many users there are."""

Connect = Callable[[str, aiohttp.ClientSession], Engine]
"""The engine at an address."""


class FleetSampler:
    """Samples from whichever replicas there are when it is asked."""

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        folder: Path,
        say: Callable[[str], None],
        connect: Connect = VllmEngine,
    ) -> None:
        """addresses: of the replicas that serve. folder: the cycle's, which engines can read. say: one line for people."""
        self._addresses = addresses
        self._folder = folder
        self._say = say
        self._connect = connect

    def sample(self, roles: Roles, prompts: Sequence[list[int]], sampler: Sampler) -> list[Rollout | None]:
        """One reply of the policy to each prompt, in the order given; None where no replica gave one."""
        assert (sampler.temperature, sampler.min_p) == (1.0, 0.0), (
            "engines report log-probabilities of no other"
        )
        for left in self._folder.glob(f"{PREFIX}*"):
            shutil.rmtree(left)
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
                found = await _Round(replicas, name, sampler).ask(prompts)
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
        """Requests of ours."""
        self.most = AT_ONCE_BESIDE_USERS
        """So many of ours it may have."""
        self._peak = 0
        """The most that it had of ours since the last look."""
        self._quiet_at = time.monotonic()

    @property
    def is_free(self) -> bool:
        return not self.failure and self.running < self.most

    async def prepare(self, name: str, adapter: Path) -> None:
        """Loads the adapter, and forgets what a run that was killed has left."""
        try:
            models = await self.engine.models()
            for left in sorted(models.names):
                if left.startswith(PREFIX):
                    await self.engine.unload(left)
            await self.engine.load(name, str(adapter))
            await self.engine.complete_one(name)
            self.context_tokens = models.context_tokens
            await self.look()
        except (EngineUnavailable, PolicyRefused) as error:
            self.failure = error.message

    async def unload(self, name: str) -> None:
        with suppress(EngineUnavailable):
            await self.engine.unload(name)

    def begin(self) -> None:
        self.running += 1
        self._peak = max(self._peak, self.running)

    async def look(self) -> None:
        """Sees whether it has users: who asked what we did not. Raises EngineUnavailable."""
        num_requests = await self.engine.num_requests()
        if num_requests > self._peak:
            self._quiet_at = time.monotonic() + QUIET_SECONDS
        self._peak = self.running
        self.most = AT_ONCE if time.monotonic() >= self._quiet_at else AT_ONCE_BESIDE_USERS


class _Round:
    """An iteration's prompts, asked of replicas that have the adapter."""

    def __init__(self, replicas: Sequence[_Replica], name: str, sampler: Sampler) -> None:
        self._replicas = replicas
        self._name = name
        self._sampler = sampler
        self._changed = asyncio.Condition()
        """A replica may be free now, or left out."""

    async def ask(self, prompts: Sequence[list[int]]) -> list[Rollout | None]:
        """As `FleetSampler.sample`. What is still under way when patience ends is aborted."""
        watches = [asyncio.create_task(self._watch(replica)) for replica in self._replicas]
        tasks = [asyncio.create_task(self._reply(prompt)) for prompt in prompts]
        try:
            done, _ = await asyncio.wait(tasks, timeout=PATIENCE_SECONDS)
        finally:
            for task in (*watches, *tasks):
                task.cancel()
            await asyncio.gather(*watches, *tasks, return_exceptions=True)
        return [task.result() if task in done else None for task in tasks]

    async def _reply(self, prompt: list[int]) -> Rollout | None:
        """By one replica after the other, until one gives it."""
        room = min(self._sampler.max_tokens, self._sampler.context_tokens - len(prompt))
        if room < 1:
            return None
        while (replica := await self._take(len(prompt) + room)) is not None:
            try:
                completion = await replica.engine.complete(
                    self._name,
                    prompt,
                    max_tokens=room,
                    end_ids=self._sampler.end_ids,
                    priority=PRIORITY,
                )
                return self._rollout(prompt, completion)
            except EngineUnavailable as error:
                replica.failure = error.message
            finally:
                replica.running -= 1
                await self._announce()
        return None

    def _rollout(self, prompt: list[int], completion: Completion) -> Rollout:
        ended = completion.token_ids[-1] in self._sampler.end_ids
        return Rollout(prompt, completion.token_ids, completion.logprobs, ended)

    async def _take(self, num_tokens: int) -> _Replica | None:
        """A turn with the replica that has most room for more; waits for it. None where none is left that has such a context."""

        def fitting() -> list[_Replica]:
            return [each for each in self._replicas if not each.failure and each.context_tokens >= num_tokens]

        async with self._changed:
            await self._changed.wait_for(
                lambda: not (left := fitting()) or any(each.is_free for each in left)
            )
            free = [each for each in fitting() if each.is_free]
            if not free:
                return None
            chosen = max(free, key=lambda each: each.most - each.running)
            chosen.begin()
            return chosen

    async def _watch(self, replica: _Replica) -> None:
        """Looks again and again, until it is left out."""
        while not replica.failure:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await replica.look()
            except EngineUnavailable as error:
                replica.failure = error.message
            await self._announce()

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()
