"""An engine that does as it is told: for faults that a real vLLM cannot be made to have on demand."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from service.engine import Completion, Message, Models, Sampling
from service.errors import DeadlineExceeded, EngineGone, EngineUnavailable, PolicyNotLoaded, PolicyRefused
from service.pieces import Piece
from service.policies import BASE


def _set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass
class FakeEngine:
    """Implements `service.engine.Engine`. Says `replies[index]`, a word a piece."""

    url: str = "fake"
    replies: tuple[str, ...] = ("one two", "three four")
    says: dict[str, str] = field(default_factory=dict)
    """What a policy says instead."""
    held: set[str] = field(default_factory=lambda: {BASE})
    alive: bool = True
    model: str | None = None
    """Names itself so, instead of as the policy asked for."""
    breaks_after: int | None = None
    """Goes away after so many pieces, each time that it is asked."""
    fails_with: EngineUnavailable | None = None
    """How it goes away; unless told, it says that it failed."""
    hangs: bool = False
    """Its HTTP answers, and no token comes."""
    hang_seconds: float = 1.0
    """For which it is waited, when it is asked for a token to show that it works."""
    pause_seconds: float = 0.0
    """Between pieces."""
    may_end: threading.Event = field(default_factory=_set)
    """The last piece waits for it."""
    logprobs: dict[str, float] = field(default_factory=dict)
    """What every token of a policy scores."""
    cannot_load: set[str] = field(default_factory=set)
    load_seconds: float = 0.0
    may_load: threading.Event = field(default_factory=_set)
    """Loading waits for it."""
    exchanges: bool = False
    """It holds one policy at a time, and can load none while it answers."""
    answering: int = 0
    completes: int | None = None
    """So many replies to token ids, and then it goes away; None: as many as are asked for."""
    completed: list[list[int]] = field(default_factory=list)
    """The prompts that it replied to."""
    completing: int = 0
    most_completing: int = 0
    """At once, so far."""
    priorities: set[int] = field(default_factory=set)
    asked: list[tuple[str, list[Message], Sampling, int]] = field(default_factory=list)
    looked_at: threading.Event = field(default_factory=threading.Event)
    """It hung when it was asked for a token to show that it works."""
    aborted: int = 0
    forgotten: int = 0
    """How often it was to be asked anew what it holds."""
    dropped: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def generate(
        self,
        policy: str,
        messages: Sequence[Message],
        sampling: Sampling,
        count: int,
        *,
        stream: bool,
        deadline: float,
    ) -> AsyncIterator[AsyncIterator[list[Piece]]]:
        self._check_alive()
        if policy not in self.held:
            raise PolicyNotLoaded(f"{policy} is not loaded")
        self.asked.append((policy, list(messages), sampling, count))
        whole = False

        async def pieces() -> AsyncIterator[list[Piece]]:
            nonlocal whole
            replies = (self.says[policy],) if policy in self.says else self.replies
            plan = self._plan(replies, self.model or policy, count)
            for number, piece in enumerate(plan):
                if number == self.breaks_after:
                    raise self.fails_with or EngineUnavailable("The engine went away.")
                if self.hangs:
                    await self.dropped.wait()
                    raise EngineGone("The engine stopped answering.")
                await self._pause(deadline)
                while number == len(plan) - 1 and not self.may_end.is_set():
                    await asyncio.sleep(0.01)
                yield [piece]
            whole = True

        self.answering += 1
        try:
            yield pieces()
        finally:
            self.answering -= 1
            self.aborted += not whole

    async def _pause(self, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.sleep(self.pause_seconds)
        except TimeoutError:
            raise DeadlineExceeded("The answer took too long. Ask for fewer tokens.") from None

    def _plan(self, replies: Sequence[str], model: str, count: int) -> list[Piece]:
        plan = []
        for index in range(count):
            words = replies[index % len(replies)].split(" ")
            for number, word in enumerate(words, start=1):
                last = number == len(words)
                plan.append(Piece(index, word + " " * (not last), "stop" if last else None, 7, number, model))
        return plan

    async def models(self) -> Models:
        self._check_alive()
        return Models(frozenset(self.held), 512)

    async def complete_one(self, policy: str) -> None:
        self._check_alive()
        if self.hangs:
            self.looked_at.set()
            await asyncio.sleep(self.hang_seconds)
            raise EngineGone("The engine did not answer.")

    def forget(self) -> None:
        self.forgotten += 1

    def drop(self) -> None:
        self.dropped.set()
        self.dropped = asyncio.Event()

    async def load(self, policy: str, path: str) -> None:
        self._check_alive()
        if policy in self.cannot_load:
            raise PolicyRefused("the engine could not load it")
        assert not (self.exchanges and self.answering), "a request was answered by two policies"
        if self.exchanges:
            self.held.clear()
        await asyncio.sleep(self.load_seconds)
        while not self.may_load.is_set():
            await asyncio.sleep(0.01)
        self.held.add(policy)

    async def unload(self, policy: str) -> None:
        self._check_alive()
        self.held.discard(policy)

    async def logprob(self, policy: str, prefix: list[int], token: int) -> float:
        return self.logprobs.get(policy, -1.0)

    async def complete(
        self, policy: str, prompt: list[int], *, max_tokens: int, end_ids: Sequence[int], priority: int
    ) -> Completion:
        """The prompt again, as far as there is room, and an end token where that is not all of it."""
        self._check_alive()
        if policy not in self.held:
            raise EngineUnavailable(f"The engine answered 404 to {policy}.")
        self.priorities.add(priority)
        self.completing += 1
        self.most_completing = max(self.most_completing, self.completing)
        try:
            await asyncio.sleep(self.pause_seconds)
            if self.hangs:
                await self.dropped.wait()
            if self.completes is not None and len(self.completed) >= self.completes:
                self.alive = False
            self._check_alive()
        finally:
            self.completing -= 1
        self.completed.append(prompt)
        token_ids = [*prompt, end_ids[0]][:max_tokens]
        return Completion(token_ids, [self.logprobs.get(policy, -1.0)] * len(token_ids))

    async def metrics(self) -> str:
        self._check_alive()
        return 'vllm:num_requests_running{engine="0"} 0.0\n'

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineGone("The engine did not answer.")
