"""One request being answered: routed, generated and stored, whichever way it ends. Knows nothing of HTTP.

A reply is answered by exactly one policy, named when it begins. No database session is held meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from random import SystemRandom
from types import TracebackType

from service import metrics, replies
from service.context import Context
from service.engine import Message, Piece, Sampling
from service.errors import DeadlineExceeded, EngineGone, MixedPolicy, PolicyNotLoaded
from service.fleet import Replica
from service.pairing import Pairing, shown_order
from service.replies import Ended, Stored

log = logging.getLogger("ratchet.generation")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been checked."""

    user: str
    messages: list[Message]
    policy: str
    sampling: Sampling
    pairing: Pairing | None


@dataclass(slots=True)
class Voice:
    """One reply under way."""

    reply_id: str
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def ended(self, finish_reason: str) -> Ended:
        """How it ended, or what there is of it."""
        return Ended("".join(self.text), finish_reason, self.prompt_tokens, self.completion_tokens)


@dataclass(frozen=True, slots=True)
class Shown:
    """What is new in the reply shown at `position`. With a `finish_reason` the reply is whole, and stored."""

    position: int
    text: str
    finish_reason: str | None


@asynccontextmanager
async def generating(context: Context, asked: Asked) -> AsyncIterator["Generation"]:
    """Start answering: the engine has taken the request and its rows are committed. Leaving ends it all.

    Raises BadRequest where the engine cannot take it, EngineUnavailable where no replica can.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(metrics.RUNNING.track_inprogress())
        generation = await stack.enter_async_context(Generation(context, asked))
        await generation.begin(stack)
        yield generation


class Generation:
    """Use `generating`. `stored` has the ids from then on."""

    def __init__(self, context: Context, asked: Asked) -> None:
        self.asked = asked
        self.voices: list[Voice] = []
        self.stored: Stored
        self._context = context
        self._replica: Replica
        self._pieces: AsyncIterator[Piece]
        self._started = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + context.settings.request_deadline_seconds
        self._order = shown_order(self.count, SystemRandom())

    @property
    def count(self) -> int:
        """Number of replies."""
        return 1 if self.asked.pairing is None else 2

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Store what there is of replies that did not end; also when the client went away."""
        metrics.REPLY_SECONDS.observe(time.monotonic() - self._started)
        reason = "error" if isinstance(error, Exception) else "abort"
        open_voices = [voice for voice in self.voices if voice.finish_reason is None]
        if open_voices:
            await asyncio.shield(asyncio.gather(*(self._end(voice, reason) for voice in open_voices)))

    async def begin(self, stack: AsyncExitStack) -> None:
        """Open the engine's stream (closed with `stack`), then commit the rows while it works."""
        async with self._in_time():
            await self._open(stack)
        asked = self.asked
        self.stored = await replies.begin(
            self._context.sessions,
            user=asked.user,
            messages=asked.messages,
            policy=asked.policy,
            sampling=asked.sampling,
            pairing=asked.pairing,
        )
        self.voices = [Voice(reply_id) for reply_id in self.stored.reply_ids]
        if asked.pairing is not None:
            metrics.COMPARISONS.labels(asked.pairing.reason).inc()

    async def _open(self, stack: AsyncExitStack) -> None:
        """Try replicas until one takes the request. Each that fails is routed to no more, so this ends."""
        asked = self.asked
        while True:
            async with AsyncExitStack() as attempt:
                replica = attempt.enter_context(self._context.fleet.lease(asked.policy))
                try:
                    self._pieces = await attempt.enter_async_context(
                        replica.engine.generate(asked.policy, asked.messages, asked.sampling, self.count)
                    )
                except PolicyNotLoaded:
                    replica.verified.discard(asked.policy)
                    continue
                except EngineGone:
                    replica.fail()
                    continue
                self._replica = replica
                stack.push_async_exit(attempt.pop_all())
                return

    async def shown(self) -> AsyncIterator[Shown]:
        """Every piece, at the position it is shown at. A reply's end is committed before it is yielded.

        Raises EngineUnavailable, DeadlineExceeded, MixedPolicy.
        """
        first = True
        while (piece := await self._next()) is not None:
            if piece.model != self.asked.policy:
                metrics.MIXED_POLICY.inc()
                raise MixedPolicy(
                    "The engine answered with another policy than the one asked for. Try again."
                )
            if first and piece.completion_tokens:
                first = False
                metrics.FIRST_TOKEN_SECONDS.observe(time.monotonic() - self._started)
            self._replica.saw_token()
            position = self._order[piece.index]
            voice = self.voices[position]
            voice.text.append(piece.text)
            voice.prompt_tokens, voice.completion_tokens = piece.prompt_tokens, piece.completion_tokens
            if piece.finish_reason is not None:
                await self._end(voice, piece.finish_reason)
            if piece.text or piece.finish_reason:
                yield Shown(position, piece.text, piece.finish_reason)

    async def _next(self) -> Piece | None:
        async with self._in_time():
            return await anext(self._pieces, None)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(self._deadline):
                yield
        except TimeoutError:
            seconds = self._context.settings.request_deadline_seconds
            raise DeadlineExceeded(
                f"The answer took longer than {seconds:g} s. Ask for fewer tokens."
            ) from None

    async def _end(self, voice: Voice, finish_reason: str) -> None:
        """Commit how a reply ended."""
        await replies.end(self._context.sessions, voice.reply_id, voice.ended(finish_reason))
        voice.finish_reason = finish_reason
        metrics.REPLIES.labels(self.asked.policy, finish_reason).inc()
        metrics.REPLY_TOKENS.labels(self.asked.policy).inc(voice.completion_tokens)
