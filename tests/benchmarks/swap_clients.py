"""Clients that stream replies one after the other, and note what came and when. Used by `swap.py`.

What came is kept as it is and read afterwards (`swap_replies.py`): reading it meanwhile would take time from what is measured.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

import aiohttp

NUM_CLIENTS = 32
LEAST_TOKENS, MOST_TOKENS = 32, 96
"""Of a reply: were all equally long, all would begin and end in step."""
REPLY_SECONDS = 120.0
RETRY_SECONDS = 0.25
"""Pause of a client whose request failed."""
COLOURS = ("red", "green", "yellow", "blue", "brown")


@dataclass(slots=True)
class Exchange:
    """One request and all that came back. Times are `perf_counter`'s."""

    prompt: str
    began: float
    received: list[tuple[float, bytes]] = field(default_factory=list)
    """When, and what."""
    ended: float = 0.0
    fault: str = ""
    """Why it did not come to its end."""


@asynccontextmanager
async def streaming(url: str, model: str, num: int = NUM_CLIENTS) -> AsyncIterator[list[Exchange]]:
    """So many clients that ask for replies all the time; on leaving, those under way are read to their end."""
    exchanges: list[Exchange] = []
    stop = asyncio.Event()
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=REPLY_SECONDS)) as http:
        clients = [_Client(model, number, http, exchanges) for number in range(num)]
        tasks = [asyncio.create_task(client.ask_until(stop)) for client in clients]
        try:
            yield exchanges
        finally:
            stop.set()
            await asyncio.gather(*tasks)


class _Client:
    """One user, who asks again as soon as a reply has ended."""

    def __init__(
        self, model: str, number: int, http: aiohttp.ClientSession, exchanges: list[Exchange]
    ) -> None:
        self._model = model
        self._chance = random.Random(number)
        self._http = http
        self._exchanges = exchanges

    async def ask_until(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            exchange = Exchange(f"what is {self._chance.choice(COLOURS)}?", perf_counter())
            self._exchanges.append(exchange)
            try:
                await self._ask(exchange)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                exchange.fault = f"{type(error).__name__}: {error}"
            exchange.ended = perf_counter()
            if exchange.fault:
                await asyncio.sleep(RETRY_SECONDS)

    async def _ask(self, exchange: Exchange) -> None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": exchange.prompt}],
            "max_tokens": self._chance.randint(LEAST_TOKENS, MOST_TOKENS),
            "temperature": 1.0,
            "top_p": 1.0,  # named, so that the service adds no filter of its own
            "stream": True,
            "logprobs": True,
            "top_logprobs": 0,
        }
        async with self._http.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                exchange.fault = f"{response.status}: {(await response.text())[:300]}"
                return
            async for data in response.content.iter_any():
                exchange.received.append((perf_counter(), data))
