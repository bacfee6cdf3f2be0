"""Counting votes: how often, with a session that takes as long as it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service import vote_count
from service.vote_count import VoteCount


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Database:
    """A session factory whose every count takes `seconds`, and finds one vote more than the last."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.counts = 0
        self._clock = clock
        self._seconds = seconds

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator["Database"]:
        yield self

    async def scalar(self, _: Any) -> int:
        await asyncio.sleep(0)
        self._clock.now += self._seconds
        self.counts += 1
        return self.counts


@pytest.fixture(autouse=True)
def one_vote_is_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vote_count, "FEW", 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(vote_count, "time", clock)
    return clock


async def test_a_count_that_took_long_is_kept_for_long(clock: Clock) -> None:
    votes, database = VoteCount(), Database(clock, seconds=0.5)
    assert await votes.read(database) == 1  # type: ignore[arg-type]
    clock.now += 9.9
    assert await votes.read(database) == 1  # type: ignore[arg-type]
    clock.now += 0.2
    assert await votes.read(database) == 2  # type: ignore[arg-type]


async def test_many_at_once_share_one_count(clock: Clock) -> None:
    votes, database = VoteCount(), Database(clock, seconds=0.5)
    assert await asyncio.gather(*(votes.read(database) for _ in range(9))) == [1] * 9  # type: ignore[arg-type]
    assert database.counts == 1


async def test_few_votes_are_counted_each_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vote_count, "FEW", 3)
    votes, database = VoteCount(), Database(clock, seconds=0.5)
    assert [await votes.read(database) for _ in range(4)] == [1, 2, 3, 3]  # type: ignore[arg-type]
