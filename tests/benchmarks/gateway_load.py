"""Asks for replies over HTTP and times them: as fast as they come, or at a fixed rate. Used by `gateway.py`.

One process, an `asyncio.Protocol` on uvloop and requests made beforehand, so that what is measured is the other side. An
answer is read to its end and counted, not parsed: an answer that is not whole, or not the expected one, is a fault.
"""

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from time import perf_counter
from typing import cast

HEAD_END = b"\r\n\r\n"
EVENT = b"data:"
LAST_CHUNK = b"\r\n0\r\n\r\n"
CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
JITTER = 0.4
"""A request of a fixed rate is up to this share of the interval early or late: no beat with somebody's timer."""
LONGEST_SECONDS = 180.0
"""For the last answers of a visit: a slow gateway on a busy machine takes a minute for 64 streams."""

Count = Callable[[bytes], int]
"""The tokens of a whole response; 0 where it is not what was asked for."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect to."""

    host: str
    port: int

    def request(self, path: str, body: bytes) -> bytes:
        """A POST of JSON to this address."""
        head = f"POST {path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\ncontent-type: application/json\r\n"
        return f"{head}authorization: Bearer none\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked for, again and again. `mark`: what the first token's bytes contain."""

    address: Address
    requests: tuple[bytes, ...]
    count: Count
    mark: bytes


@dataclass(slots=True)
class Exchange:
    """One request and its answer. Times are `perf_counter`'s."""

    began: float
    event: float = 0.0
    """The first server-sent event, whatever is in it; 0 where the answer is not streamed."""
    first: float = 0.0
    """The first token."""
    ended: float = 0.0
    tokens: int = 0
    """0: a fault."""
    fault: bytes = b""


@dataclass(slots=True)
class Flow:
    """What went through in a window. Answers only partly inside it count by the share of their time that was."""

    seconds: float
    requests: float = 0.0
    tokens: float = 0.0
    answers: int = 0
    """Right ones in all, those outside the window included."""
    faults: list[bytes] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One connection, kept alive, with one request under way at a time."""

    def __init__(self, ask: Ask, done: Callable[["Client", Exchange], None]) -> None:
        self._ask = ask
        self._done = done
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._exchange: Exchange | None = None
        self._whole_at: int | None = None
        """Length of the whole response; -1 where it comes in HTTP chunks; None before its head is here."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, and no subclass

    def send(self, request: bytes, began: float) -> None:
        """Ask; `done` is called with the answer."""
        self._exchange = Exchange(began)
        self._whole_at = None
        self._received.clear()
        self._transport.write(request)

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        assert self._exchange is not None, "an answer without a question"
        self._received += data
        if not self._exchange.first:
            self._time_first(self._exchange, data)
        if self._whole_at is None:
            self._whole_at = _length(self._received)
        if self._is_whole():
            self._end(b"")

    def connection_lost(self, error: Exception | None) -> None:
        if self._exchange is not None:
            self._end(b"the connection was closed before the answer was whole")

    def _time_first(self, exchange: Exchange, data: bytes) -> None:
        if not exchange.event and EVENT in data:
            exchange.event = perf_counter()
        if self._ask.mark in data:
            exchange.first = perf_counter()

    def _is_whole(self) -> bool:
        if self._whole_at == -1:
            return self._received.endswith(LAST_CHUNK)
        return self._whole_at is not None and len(self._received) >= self._whole_at

    def _end(self, fault: bytes) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        exchange.ended = perf_counter()
        response = bytes(self._received)
        exchange.tokens = 0 if fault else self._ask.count(response)
        if not exchange.tokens:
            exchange.fault = fault or response[:500]
        self._done(self, exchange)


def _length(received: bytearray) -> int | None:
    head_end = received.find(HEAD_END)
    if head_end < 0:
        return None
    found = CONTENT_LENGTH.search(received, 0, head_end)
    return head_end + len(HEAD_END) + int(found[1]) if found else -1


async def saturate(
    ask: Ask, streams: int, warm_seconds: float, seconds: float, meter: Callable[[], None]
) -> Flow:
    """Keep `streams` requests under way. The window opens after `warm_seconds`; `meter` is called at its ends.

    All answers are read to their end, also those that end after the window.
    """
    exchanges: list[Exchange] = []
    requests = cycle(ask.requests)
    stopping, idle = False, asyncio.Event()
    left = streams

    def done(client: Client, exchange: Exchange) -> None:
        nonlocal left
        exchanges.append(exchange)
        if stopping or exchange.fault:
            left -= 1
            if not left:
                idle.set()
        else:
            client.send(next(requests), exchange.ended)

    clients = [await _connect(ask, done) for _ in range(streams)]
    for client in clients:
        client.send(next(requests), perf_counter())
    await asyncio.sleep(warm_seconds)
    opened = perf_counter()
    meter()
    await asyncio.sleep(seconds)
    closed = perf_counter()
    meter()
    stopping = True
    await _in_time(idle, lambda: f"{left} of {streams} answers of {ask.address} did not end")
    for client in clients:
        client.close()
    return flow_between(exchanges, opened, closed)


def flow_between(exchanges: list[Exchange], opened: float, closed: float) -> Flow:
    """What of these answers fell between two times."""
    flow = Flow(closed - opened, answers=sum(not each.fault for each in exchanges))
    for each in exchanges:
        inside = min(each.ended, closed) - max(each.began, opened)
        if each.fault:
            flow.faults.append(each.fault)
        elif inside > 0:
            share = inside / (each.ended - each.began)
            flow.requests += share
            flow.tokens += share * each.tokens
    return flow


def check(name: str, flow: Flow) -> None:
    """Raises RuntimeError, with an answer, where there are faults."""
    if flow.faults:
        raise RuntimeError(f"{name}: {len(flow.faults)} wrong answers, such as {flow.faults[0]!r}")


async def at_rate(ask: Ask, per_second: float, seconds: float, chance: random.Random) -> list[Exchange]:
    """Send at a fixed rate whatever comes back (open loop), on as many connections as that takes."""
    exchanges: list[Exchange] = []
    free: list[Client] = []
    clients: list[Client] = []
    idle = asyncio.Event()

    def done(client: Client, exchange: Exchange) -> None:
        exchanges.append(exchange)
        if not exchange.fault:
            free.append(client)
        if len(exchanges) == round(per_second * seconds):
            idle.set()

    requests = cycle(ask.requests)
    for due in _times(per_second, seconds, chance):
        await asyncio.sleep(due - perf_counter())
        if not free:
            clients.append(await _connect(ask, done))
            free.append(clients[-1])
        free.pop().send(next(requests), perf_counter())
    await _in_time(idle, lambda: f"only {len(exchanges)} answers of {ask.address} ended")
    for client in clients:
        client.close()
    return exchanges


def _times(per_second: float, seconds: float, chance: random.Random) -> Iterator[float]:
    start, interval = perf_counter(), 1 / per_second
    for number in range(round(per_second * seconds)):
        yield start + (number + 0.5 + chance.uniform(-JITTER, JITTER)) * interval


async def _in_time(idle: asyncio.Event, reason: Callable[[], str]) -> None:
    """Raises RuntimeError for answers that do not come."""
    try:
        await asyncio.wait_for(idle.wait(), LONGEST_SECONDS)
    except TimeoutError:
        raise RuntimeError(f"{reason()} within {LONGEST_SECONDS:g} s") from None


async def _connect(ask: Ask, done: Callable[[Client, Exchange], None]) -> Client:
    address = ask.address
    _, client = await asyncio.get_running_loop().create_connection(
        lambda: Client(ask, done), address.host, address.port
    )
    return client
