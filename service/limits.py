"""How much may be asked: calls in a minute by key and by address, and replies at once by user and in all.

Counted in this process: with several workers each has its own. Used by `auth.py`, `gateway.py` and `generation.py`.
"""

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from service import metrics
from service.errors import Overloaded, TooManyRequests
from service.journal import UserName
from service.settings import Settings

MOST_BUCKETS = 100_000


class Rate:
    """Token buckets: each key may make `per_minute` calls at once, and wins them back over a minute."""

    def __init__(self, per_minute: int, what: str) -> None:
        self._most = float(per_minute)
        self._per_second = per_minute / 60
        self._what = what
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, key: Hashable) -> None:
        """Count a call. Raises TooManyRequests that says when the next one may come."""
        now = time.monotonic()
        left, seen = self._buckets.pop(key, (self._most, now))
        left = min(self._most, left + (now - seen) * self._per_second)
        self._buckets[key] = (max(0.0, left - 1), now) if left >= 1 else (left, now)
        if len(self._buckets) > MOST_BUCKETS:
            self._buckets.popitem(last=False)
        if left < 1:
            raise TooManyRequests(
                f"This {self._what} makes more than {self._most:g} calls in a minute. Wait, then try again.",
                code="rate_limit_exceeded",
                retry_after_seconds=math.ceil((1 - left) / self._per_second),
            )


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request in the queue."""

    replies: int
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Limits:
    """One per service process."""

    def __init__(self, settings: Settings) -> None:
        self._keys = Rate(settings.requests_per_minute, "key")
        self._addresses = Rate(settings.address_requests_per_minute, "address")
        self._most_running = settings.max_running
        self._most_per_user = settings.max_running_per_user
        self._most_queued = settings.max_queued
        self._running = 0
        self._by_user: Counter[UserName] = Counter()
        self._queue: deque[_Waiter] = deque()

    def count_key(self, key_id: int | None) -> None:
        """Raises TooManyRequests."""
        self._keys.take(key_id)

    def count_address(self, address: str) -> None:
        """Raises TooManyRequests."""
        self._addresses.take(address)

    @asynccontextmanager
    async def generating(self, user: UserName, replies: int) -> AsyncIterator[None]:
        """Hold places for so many replies, after waiting in turn. Raises TooManyRequests, Overloaded."""
        if self._by_user[user] + replies > self._most_per_user:
            raise TooManyRequests(
                f"This user already has {self._by_user[user]} replies under way or waiting, of {self._most_per_user} "
                "allowed. Let one end first.",
                code="too_many_running",
            )
        self._by_user[user] += replies
        try:
            await self._take_places(replies)
            try:
                yield
            finally:
                self._running -= replies
                self._admit()
        finally:
            self._by_user[user] -= replies
            if not self._by_user[user]:
                del self._by_user[user]

    async def _take_places(self, replies: int) -> None:
        if not self._queue and self._running + replies <= self._most_running:
            self._running += replies
            return
        if len(self._queue) >= self._most_queued:
            raise Overloaded(
                f"The service is busy: {len(self._queue)} requests wait already. Try again soon.",
                code="queue_full",
            )
        waiter = _Waiter(replies)
        self._queue.append(waiter)
        metrics.QUEUED.set(len(self._queue))
        try:
            await waiter.turn
        except asyncio.CancelledError:
            self._leave(waiter)
            raise

    def _leave(self, waiter: _Waiter) -> None:
        """A request that no longer waits; if its turn had just come, its places go to the next."""
        if waiter.turn.cancelled():
            self._queue.remove(waiter)
        else:
            self._running -= waiter.replies
        self._admit()

    def _admit(self) -> None:
        """Let those at the head of the queue go on, strictly in turn."""
        waiting = [waiter for waiter in self._queue if not waiter.turn.cancelled()]
        for waiter in waiting:
            if self._running + waiter.replies > self._most_running:
                break
            self._queue.remove(waiter)
            self._running += waiter.replies
            waiter.turn.set_result(None)
        metrics.QUEUED.set(len(self._queue))
