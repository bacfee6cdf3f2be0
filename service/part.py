"""One request to an engine, and where its replica fails before anything of the answer has gone on, one more to another replica.

Used by `generation.py`. Knows nothing of rows or HTTP.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType

from service import metrics
from service.engine import Message, Sampling
from service.errors import (
    DeadlineExceeded,
    EngineGone,
    EngineUnavailable,
    EngineUnreachable,
    PolicyNotLoaded,
    RatchetError,
)
from service.fleet import Fleet, Replica
from service.pieces import Piece

log = logging.getLogger("ratchet.part")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of an engine: replies of one policy to one prompt."""

    policy: str
    messages: Sequence[Message]
    sampling: Sampling
    first: int
    """Number of its first reply among all that were asked for; in a duel another engine gives the others."""
    count: int
    stream: bool
    """Whether the engine streams."""
    held: bool
    """Nothing goes on before all is there: the client waits for the whole."""
    deadline: float
    """By the loop's clock."""


class Part:
    """Entered: an engine has taken the question (else it raises as `Engine.generate`). Leaving aborts it.

    A replica that could not be asked, or lacks the policy, is passed over for the next. One that failed with the question in hand is
    replaced once and no more, lest a question that ends engines end all of them; and not after a client has seen a token,
    since another replica would draw another reply.
    """

    def __init__(self, fleet: Fleet, question: Question) -> None:
        self.taken = False
        """Whether an engine works on it, as far as is known."""
        self._fleet = fleet
        self._question = question
        self._attempt = AsyncExitStack()
        self._tried: set[Replica] = set()
        self._failed: EngineUnavailable | None = None
        """What befell the first replica that had taken it."""
        self._replica: Replica
        self._pieces: AsyncIterator[list[Piece]]

    async def __aenter__(self) -> "Part":
        try:
            await self._open()
        except BaseException as error:
            await self._attempt.aclose()
            self.taken = self.taken and not isinstance(error, RatchetError)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._attempt.aclose()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What comes, as it comes. Raises as `Engine.generate`, once no other replica may be asked."""
        question = self._question
        held: list[list[Piece]] = []
        seen = False
        while True:
            try:
                async for each in self._pieces:
                    self._replica.saw_token()
                    if question.first:
                        for piece in each:
                            piece.reply += question.first
                    if question.held:
                        held.append(each)
                        continue
                    seen = seen or any(map(_is_seen, each))
                    yield each
            except EngineUnavailable as error:
                self._blame(error)
                if not seen and await self._ask_another(error):
                    held.clear()
                    continue
                for each in held:  # is stored with the failure
                    yield each
                raise
            for each in held:
                yield each
            return

    async def _open(self) -> None:
        """Ask replicas until one takes the question."""
        question = self._question
        while True:
            replica = self._lease()
            self.taken = True
            try:
                self._pieces = await self._attempt.enter_async_context(
                    replica.engine.generate(
                        question.policy,
                        question.messages,
                        question.sampling,
                        question.count,
                        stream=question.stream,
                        deadline=question.deadline,
                    )
                )
                return
            except EngineUnavailable as error:
                self._blame(error)
                await self._leave(error)

    def _lease(self) -> Replica:
        try:
            self._replica = self._attempt.enter_context(self._fleet.lease(self._question.policy, self._tried))
        except EngineUnavailable:
            if self._failed is not None:
                raise self._failed from None
            raise
        self._tried.add(self._replica)
        return self._replica

    def _blame(self, error: EngineUnavailable) -> None:
        """Note what a replica that failed is good for from now on."""
        if isinstance(error, PolicyNotLoaded):
            self._replica.verified.discard(self._question.policy)
        elif isinstance(error, EngineGone):
            self._replica.fail()
        else:
            self._replica.doubt()

    async def _leave(self, error: EngineUnavailable) -> None:
        """Leave a replica for another one. Raises the error where none may be asked."""
        await self._attempt.aclose()
        self.taken = False
        if isinstance(error, PolicyNotLoaded | EngineUnreachable):
            return
        if self._failed is not None:
            raise error
        self._failed = error
        metrics.RETRIES.inc()

    async def _ask_another(self, error: EngineUnavailable) -> bool:
        """Whether another replica has taken the question, after one that had."""
        try:
            async with asyncio.timeout_at(self._question.deadline):
                await self._leave(error)
                await self._open()
        except TimeoutError:
            raise DeadlineExceeded("The answer took too long. Ask for fewer tokens.") from None
        except RatchetError as end:
            self.taken = True
            if end is not error:
                log.warning("no other engine took it up: %s", end.message)
            return False
        return True


def _is_seen(piece: Piece) -> bool:
    """Whether a client is shown anything of it: an engine's first piece may be empty, and half a character is no text yet."""
    return bool(piece.text or piece.finish_reason or piece.logprobs)
