"""An engine that says a word when a test lets it: what a client shows before the next is let out came through at once."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from service.pieces import Piece
from tests.service.fake_engine import FakeEngine

LOOK_SECONDS = 0.01


class LockstepEngine(FakeEngine):
    """Says "one two three", a word for each `let.release()`, which may come from any thread."""

    def __init__(self) -> None:
        super().__init__(replies=("one two three",))
        self.let = threading.Semaphore(0)

    @asynccontextmanager
    async def generate(self, *args: Any, **fields: Any) -> AsyncIterator[AsyncIterator[list[Piece]]]:
        async def let_out(pieces: AsyncIterator[list[Piece]]) -> AsyncIterator[list[Piece]]:
            async for piece in pieces:
                while not self.let.acquire(blocking=False):
                    await asyncio.sleep(LOOK_SECONDS)
                yield piece

        async with super().generate(*args, **fields) as pieces:
            yield let_out(pieces)
