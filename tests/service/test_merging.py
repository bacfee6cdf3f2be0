"""Several streams as one."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.merging import merged


async def say(words: str, seconds: float = 0.0) -> AsyncIterator[str]:
    for word in words.split():
        await asyncio.sleep(seconds)
        yield word


async def test_everything_comes_and_the_quick_does_not_wait_for_the_slow() -> None:
    said = [word async for word in merged([say("slow down", 1.0), say("a b c d")])]
    assert said == ["a", "b", "c", "d", "slow", "down"]


async def test_an_error_of_one_ends_it_and_stops_the_others() -> None:
    stopped = asyncio.Event()

    async def endless() -> AsyncIterator[str]:
        try:
            while True:
                await asyncio.sleep(0)
                yield "still here"
        finally:
            stopped.set()

    async def broken() -> AsyncIterator[str]:
        yield "so far so good"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        async for _ in merged([endless(), broken()]):
            pass
    await asyncio.wait_for(stopped.wait(), 30)


async def test_whoever_stops_reading_leaves_nothing_running() -> None:
    together = merged([say("a b", 0.01), say("c d", 60)])
    assert await anext(together) == "a"
    await together.aclose()
    assert len(asyncio.all_tasks()) == 1
