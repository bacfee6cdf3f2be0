"""How many votes there are, for `/v1/status`, which every open page asks for again and again."""

import asyncio
import math
import time

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service.tables import Vote

REMEMBERED = 20.0
"""The number is kept for so many times as long as counting took: counting reads every vote, and takes a twentieth of the
time at most: ten million are counted every ten seconds."""
FEW = 10_000
"""So many votes are counted anew each time: whoever votes early on wants to see their vote arrive."""


class VoteCount:
    """One per service process."""

    def __init__(self) -> None:
        self._count = 0
        self._good_until = -math.inf
        self._counting = asyncio.Lock()

    async def read(self, sessions: async_sessionmaker[AsyncSession]) -> int:
        """The number, as of a moment ago. Many at once share one count."""
        async with self._counting:
            began = time.monotonic()
            if began >= self._good_until:
                async with sessions() as session:
                    self._count = await session.scalar(select(func.count()).select_from(Vote)) or 0
                now = time.monotonic()
                if self._count >= FEW:
                    self._good_until = now + REMEMBERED * (now - began)
            return self._count
