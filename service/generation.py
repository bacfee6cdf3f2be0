"""One request being answered: routed, generated and stored, whichever way it ends. Knows nothing of HTTP.

A reply is of exactly one policy, named when it begins; in a duel the two replies are of two. No database session is held meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from random import SystemRandom
from types import TracebackType
from typing import NamedTuple

from service import logs, metrics, tracing
from service.context import Context
from service.engine import Message, Sampling
from service.errors import DeadlineExceeded, MixedPolicy
from service.journal import Begun, Ended, Stored, UserName
from service.merging import merged
from service.pairing import Objection, Pairing, objection, shown_order
from service.part import Part, Question
from service.pieces import Piece

log = logging.getLogger("ratchet.generation")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been checked."""

    user: UserName
    messages: list[Message]
    policies: tuple[str, ...]
    """The policy of each reply that is asked for; in a duel they differ."""
    sampling: Sampling
    pairing: Pairing | None
    """Set where more than one reply is asked for."""
    duel_id: int | None = None
    conversation: str | None = None
    stream: bool = True

    @property
    def count(self) -> int:
        """Number of replies."""
        return len(self.policies)


@dataclass(slots=True)
class Voice:
    """One reply under way."""

    reply_id: str
    policy: str
    text: list[str] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def content(self) -> str:
        """All that it has said so far."""
        return "".join(self.text)

    def add(self, piece: Piece) -> None:
        """What the engine adds to it; its end is not noted here, but once it is stored."""
        self.text.append(piece.text)
        if piece.logprobs is not None:
            self.logprobs.append(piece.logprobs)
        self.prompt_tokens, self.completion_tokens = piece.prompt_tokens, piece.completion_tokens

    def ended(self, finish_reason: str) -> Ended:
        """How it ended, or what there is of it."""
        return Ended(self.content, finish_reason, self.prompt_tokens or None, self.completion_tokens)


class Shown(NamedTuple):
    """What is new in the reply shown at `position`. With a `finish_reason` the reply is whole, and stored."""

    position: int
    text: str
    finish_reason: str | None
    logprobs: bytes | None


@asynccontextmanager
async def generating(context: Context, asked: Asked) -> AsyncIterator["Generation"]:
    """Start answering: the engine has taken the request, and where it streams, its rows are committed.

    Leaving ends it all. Raises BadRequest where the engine cannot take it, EngineUnavailable where no replica can,
    TooManyRequests and Overloaded where there is no place for it.
    """
    logs.note_policies(asked.policies)
    async with AsyncExitStack() as stack:
        stack.enter_context(metrics.RUNNING.track_inprogress())
        generation = await stack.enter_async_context(Generation(context, asked))
        await generation.begin(stack)
        yield generation


class Generation:
    """Use `generating`. `stored` has the ids."""

    def __init__(self, context: Context, asked: Asked) -> None:
        self.asked = asked
        self.stored = Stored.new(asked.count, asked.pairing is not None)
        self._order = shown_order(asked.count, SystemRandom())
        shown_policies = [asked.policies[self._order.index(position)] for position in range(asked.count)]
        self.voices = list(map(Voice, self.stored.reply_ids, shown_policies))
        self.deadline = asyncio.get_running_loop().time() + context.settings.request_deadline_seconds
        self._context = context
        self._pieces: AsyncIterator[list[Piece]]
        self._started = time.monotonic()
        self._parts: list[Part] = []
        self._engine_seconds = 0.0
        """Spent waiting for engines: until the first token of a stream, or for the whole."""
        self._rows: asyncio.Future[None] | None = None
        """Done once they are there; None where they have not been written yet."""

    def objection(self) -> Objection | None:
        """Why the replies are not worth a vote, once they have ended."""
        return objection([(voice.content, voice.finish_reason) for voice in self.voices])

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Store what there is of replies that did not end; also when the client went away."""
        seconds = time.monotonic() - self._started
        metrics.REPLY_SECONDS.observe(seconds)
        reason = "error" if isinstance(error, Exception) else "abort"
        if self._rows is not None and not self._rows.done():  # they must not be stored twice
            await asyncio.shield(asyncio.wait({self._rows}))
        if self._begun:
            cut_off = [(voice, reason) for voice in self.voices if voice.finish_reason is None]
            if cut_off:
                await asyncio.shield(self._end(cut_off))
        elif any(part.taken for part in self._parts):
            await asyncio.shield(self._begin_whole(reason))
        if tracing.is_on():
            self._trace(seconds, error)

    def _trace(self, seconds: float, error: BaseException | None) -> None:
        """A span, by OpenTelemetry's conventions for generative AI (attributes of one inference, client side)."""
        asked, voices = self.asked, self.voices
        policies = list(dict.fromkeys(asked.policies))
        attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": policies[0],
            "gen_ai.request.choice.count": asked.count if asked.count > 1 else None,
            "gen_ai.conversation.id": asked.conversation,
            "gen_ai.request.max_tokens": asked.sampling.max_tokens,
            "gen_ai.request.temperature": asked.sampling.temperature,
            "gen_ai.request.top_p": asked.sampling.top_p,
            "gen_ai.request.seed": asked.sampling.seed,
            "gen_ai.response.id": self.stored.id,
            "gen_ai.response.model": policies[0],
            "gen_ai.response.finish_reasons": [voice.finish_reason or "error" for voice in voices],
            "gen_ai.usage.input_tokens": max(voice.prompt_tokens for voice in voices) or None,
            "gen_ai.usage.output_tokens": sum(voice.completion_tokens for voice in voices),
            "ratchet.policies": policies,
            "ratchet.comparison.id": self.stored.comparison_id,
        }
        tracing.record_chat(f"chat {policies[0]}", seconds, attributes, error)

    async def begin(self, stack: AsyncExitStack) -> None:
        """Open the engine's stream (closed with `stack`), and meanwhile, where the answer streams, commit its rows."""
        try:
            async with asyncio.timeout_at(self.deadline):
                await stack.enter_async_context(
                    self._context.limits.generating(self.asked.user, self.asked.count)
                )
                await self._open_and_begin(stack)
        except TimeoutError:
            seconds = self._context.settings.request_deadline_seconds
            raise DeadlineExceeded(
                f"The answer took longer than {seconds:g} s. Ask for fewer tokens."
            ) from None

    async def _open_and_begin(self, stack: AsyncExitStack) -> None:
        for policy in set(self.asked.policies):
            self._context.fleet.route(policy)  # raises before anything is stored
        if not self.asked.stream:
            await self._open(stack)
            return
        rows = self._begin(None)
        try:
            await self._open(stack)
        finally:
            await asyncio.shield(rows)

    def _begin(self, ended: tuple[Ended, ...] | None) -> "asyncio.Future[None]":
        """Commit the prompt, its replies and their comparison. Never to be cancelled: it would not be known whether they are there."""
        asked = self.asked
        self._rows = self._context.journal.begin(
            Begun(
                user=asked.user,
                messages=asked.messages,
                policies=[voice.policy for voice in self.voices],
                sampling=asked.sampling,
                pairing=asked.pairing,
                conversation=asked.conversation,
                stored=self.stored,
                ended=ended,
                duel_id=asked.duel_id,
            )
        )
        self._rows.add_done_callback(self._note_begun)
        return self._rows

    @property
    def _begun(self) -> bool:
        """Whether the rows are there."""
        rows = self._rows
        return rows is not None and rows.done() and rows.exception() is None

    def _note_begun(self, rows: "asyncio.Future[None]") -> None:
        if self.asked.pairing is not None and rows.exception() is None:
            metrics.COMPARISONS.labels(self.asked.pairing.reason).inc()

    async def _begin_whole(self, otherwise: str) -> None:
        """Commit everything at once; `otherwise`: the finish reason of replies that have none."""
        ended = tuple(voice.ended(voice.finish_reason or otherwise) for voice in self.voices)
        await asyncio.shield(self._begin(ended))

    async def _open(self, stack: AsyncExitStack) -> None:
        """One request to an engine, which then reads the prompt once; in a duel, one for each of the two."""
        asked = self.asked
        if len(set(asked.policies)) == 1:
            self._pieces = (await self._open_part(stack, asked.policies[0], 0, asked.count)).pieces()
            return
        parts = [await self._open_part(stack, policy, i, 1) for i, policy in enumerate(asked.policies)]
        together = merged([part.pieces() for part in parts])
        stack.push_async_callback(together.aclose)
        self._pieces = together

    async def _open_part(self, stack: AsyncExitStack, policy: str, first: int, count: int) -> Part:
        asked = self.asked
        question = Question(
            policy=policy,
            messages=asked.messages,
            sampling=asked.sampling,
            first=first,
            count=count,
            stream=self._streams,
            held=not asked.stream,
            deadline=self.deadline,
        )
        part = Part(self._context.fleet, question)
        self._parts.append(part)
        asked_at = time.monotonic()
        try:
            return await stack.enter_async_context(part)
        finally:
            self._engine_seconds += time.monotonic() - asked_at

    @property
    def _streams(self) -> bool:
        """Whether the engine streams: for several replies it must, to count the tokens of each."""
        return self.asked.stream or self.asked.count > 1

    async def shown(self) -> AsyncIterator[list[Shown]]:
        """The pieces that came at once, at the positions they are shown at. A reply's end is committed before.

        Raises EngineUnavailable, DeadlineExceeded, MixedPolicy.
        """
        first = True
        waits_since = time.monotonic()
        async for pieces in self._pieces:
            if first:
                first = False
                self._note_first_token(waits_since)
            shown = [self._place(piece) for piece in pieces]
            # Half a character has no text yet, but its token has a log-probability.
            shown = [part for part in shown if part.text or part.finish_reason or part.logprobs]
            first_end = next((i for i, part in enumerate(shown) if part.finish_reason), len(shown))
            if running := shown[:first_end]:
                yield running  # does not wait for the commit of what ends beside it
            if ending := shown[first_end:]:
                await self._end(
                    [(self.voices[p.position], p.finish_reason) for p in ending if p.finish_reason]
                )
                yield ending

    def _note_first_token(self, waits_since: float) -> None:
        if self.asked.stream:
            now = time.monotonic()
            self._engine_seconds += now - waits_since
            metrics.FIRST_TOKEN_SECONDS.observe(now - self._started)
            metrics.ADDED_SECONDS.observe(now - self._started - self._engine_seconds)

    def _place(self, piece: Piece) -> Shown:
        if piece.model != self.asked.policies[piece.reply]:
            metrics.MIXED_POLICY.inc()
            raise MixedPolicy("The engine answered with another policy than the one asked for. Try again.")
        position = self._order[piece.reply]
        self.voices[position].add(piece)
        return Shown(position, piece.text, piece.finish_reason, piece.logprobs)

    async def finish(self) -> None:
        """Wait until every reply has ended, and store them. For an answer in one piece."""
        waits_since = time.monotonic()
        async for _ in self.shown():
            pass
        self._engine_seconds += time.monotonic() - waits_since
        if not self._begun:
            await self._begin_whole("error")
        if not self.asked.stream:
            metrics.ADDED_SECONDS.observe(time.monotonic() - self._started - self._engine_seconds)

    async def _end(self, ended: Sequence[tuple[Voice, str]]) -> None:
        """Commit how replies ended, where their rows are there already; else they are stored whole."""
        if self._begun:
            commits = [
                self._context.journal.end(voice.reply_id, voice.ended(reason)) for voice, reason in ended
            ]
            await asyncio.gather(*commits)
        for voice, finish_reason in ended:
            voice.finish_reason = finish_reason
            metrics.REPLIES.labels(voice.policy, finish_reason).inc()
            metrics.REPLY_TOKENS.labels(voice.policy).inc(voice.completion_tokens)
