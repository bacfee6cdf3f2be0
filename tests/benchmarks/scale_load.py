"""Asks two services the same, in turns, and compares how long they take. Used by `scale.py`."""

import asyncio
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import psycopg

from service.database import database_url
from service.engine import Message, Sampling
from service.journal import Begun, Ended, Journal, Stored, UserName
from service.pairing import Pairing
from service.policies import BASE
from service.settings import Settings
from tests.benchmarks.durability_parts import libpq_url

SAMPLES = 2000
"""Votes, users and conversations that are asked about, drawn from all."""
PER_ROUND = 32
AT_ONCE = 4
WARM_UP_ROUNDS = 3
SAMPLING = Sampling(512, 1.0, 1.0, 0.0, (), None, 0.0, 0.0)
ENDED = (Ended("one two", "stop", 3, 2), Ended("three four", "stop", 3, 2))
Subject = tuple[str, str]
"""An id, and the user to name with it."""


@dataclass(frozen=True, slots=True)
class Subjects:
    """What can be asked about."""

    votes: list[Subject]
    conversations: list[Subject]
    users: list[str]


def draw_subjects(settings: Settings) -> Subjects:
    """Random ones of all; users who say more come up more often."""
    drawn = " JOIN users AS u ON u.id = t.user_id ORDER BY random() LIMIT %s"
    with psycopg.connect(libpq_url(settings)) as connection:
        votes = connection.execute(
            f"SELECT t.comparison_id, u.name FROM votes AS t{drawn}", [SAMPLES]
        ).fetchall()
        query = f"SELECT t.id, u.name FROM conversations AS t{drawn}"
        conversations = connection.execute(query, [SAMPLES]).fetchall()
    return Subjects(votes, conversations, [user for _, user in votes])


class Side:
    """One of the two services."""

    def __init__(self, subjects: Subjects, http: aiohttp.ClientSession, journal: Journal) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._subjects = subjects
        self._http = http
        self._journal = journal
        self._chance = random.Random(0)
        self._fresh: list[Subject] = []

    async def prepare(self) -> None:
        """Comparisons that were shown just now, for the next votes."""
        asked = [self._begun(self._user()) for _ in range(PER_ROUND)]
        await asyncio.gather(*(self._journal.begin(one) for one in asked))
        self._fresh = [(one.stored.id, one.user.name) for one in asked]

    def _begun(self, user: str) -> Begun:
        return Begun(
            user=UserName("", user),
            messages=[Message("user", "What colour is a lemon?")],
            policies=(BASE, BASE),
            sampling=SAMPLING,
            pairing=Pairing("auto", 1.0),
            conversation=None,
            stored=Stored.new(2, True),
            ended=ENDED,
        )

    def _user(self) -> str:
        return self._chance.choice(self._subjects.users)

    async def ask(self, call: str, number: int) -> None:
        """Make a call, and note how long it took."""
        began = time.perf_counter()
        await CALLS[call](self, number)
        self.seconds[call].append(time.perf_counter() - began)

    async def _request(self, method: str, path: str, **options: Any) -> None:
        async with self._http.request(method, path, **options) as response:
            body = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{method} {path}: {response.status} {body[:300]!r}")

    async def give_vote(self, number: int) -> None:
        await self._vote(number, "first")

    async def change_vote(self, number: int) -> None:
        await self._vote(number, "second")

    async def _vote(self, number: int, choice: str) -> None:
        comparison, user = self._fresh[number]
        await self._request(
            "PUT", f"/v1/comparisons/{comparison}/vote", json={"choice": choice, "user": user}
        )

    async def read_vote(self, _: int) -> None:
        comparison, user = self._chance.choice(self._subjects.votes)
        await self._request("GET", f"/v1/comparisons/{comparison}/vote", params={"user": user})

    async def chat(self, _: int) -> None:
        await self._chat(comparison="auto", user=self._user())

    async def chat_on(self, _: int) -> None:
        conversation, user = self._chance.choice(self._subjects.conversations)
        await self._chat(conversation=conversation, user=user)

    async def _chat(self, **fields: str) -> None:
        body = {"model": "ratchet", "messages": [{"role": "user", "content": "And a lime?"}], **fields}
        await self._request("POST", "/v1/chat/completions", json=body)

    async def list_conversations(self, _: int) -> None:
        await self._request("GET", "/v1/conversations", params={"user": self._user()})

    async def read_conversation(self, _: int) -> None:
        conversation, user = self._chance.choice(self._subjects.conversations)
        await self._request("GET", f"/v1/conversations/{conversation}", params={"user": user})

    async def status(self, _: int) -> None:
        await self._request("GET", "/v1/status")


CALLS: dict[str, Callable[[Side, int], Awaitable[None]]] = {
    "give a vote": Side.give_vote,
    "change a vote": Side.change_vote,
    "read a vote": Side.read_vote,
    "chat, comparison: auto": Side.chat,
    "chat in a conversation": Side.chat_on,
    "list conversations": Side.list_conversations,
    "read a conversation": Side.read_conversation,
    "status": Side.status,
}


async def measure_latency(services: list[tuple[Settings, Subjects]], rounds: int) -> list[dict[str, Any]]:
    """A row for each call: p50 and p99 of both services, the small one first, milliseconds, and their ratios."""
    async with AsyncExitStack() as stack:
        sides = [await _side(stack, *service) for service in services]
        for number in range(WARM_UP_ROUNDS + rounds):
            if number == WARM_UP_ROUNDS:
                for side in sides:
                    side.seconds.clear()
            await _round(sides)
    return [_compared(call, *(side.seconds[call] for side in sides)) for call in CALLS]


async def measure_removal(settings: Settings, user: str) -> dict[str, Any]:
    """Remove a user with everything; how much that was, and the seconds that it took."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{settings.port}", timeout=timeout) as http:
        began = time.monotonic()
        async with http.delete("/operator/users", params={"user": user}) as response:
            answer = await response.json()
    seconds = round(time.monotonic() - began, 1)
    return {
        "prompts": answer.get("prompts"),
        "votes": answer.get("votes"),
        "seconds": seconds,
        "answer": answer,
    }


async def _side(stack: AsyncExitStack, settings: Settings, subjects: Subjects) -> Side:
    http = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{settings.port}"))
    journal = Journal(database_url(settings))
    await stack.enter_async_context(journal.running())
    return Side(subjects, http, journal)


async def _round(sides: list[Side]) -> None:
    """Every call, a few at once; what one side is asked the other is asked next, so that both see the same machine."""
    for side in sides:
        await side.prepare()
    turns = asyncio.Semaphore(AT_ONCE)

    async def both(call: str, number: int) -> None:
        async with turns:
            for side in sides if number % 2 else sides[::-1]:
                await side.ask(call, number)

    for call in CALLS:
        await asyncio.gather(*(both(call, number) for number in range(PER_ROUND)))


def _compared(call: str, small: list[float], large: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"call": call, "requests": len(large)}
    for percent in (50, 99):
        before, after = (_percentile(seconds, percent) for seconds in (small, large))
        row |= {f"p{percent} ms, empty": round(before, 2), f"p{percent} ms": round(after, 2)}
        row |= {f"p{percent} ratio": round(after / before, 2)}
    return row


def _percentile(seconds: list[float], percent: int) -> float:
    """In milliseconds."""
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1] * 1000
