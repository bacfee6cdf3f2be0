"""Clients that vote, revise, take back and chat while the service comes and goes, and know exactly what they were told.

A client makes one call after the other, so that the history of a comparison has one right order. Like a good client it repeats
a call that was refused (5xx) or whose answer was lost, with the same `Idempotency-Key`; sometimes it gives up instead, and
then leaves that comparison alone, as whether the call came through is open. Used by `durability.py` and a test.
"""

import asyncio
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CHOICES = ("first", "second", "tie", "neither")
TAKE_BACK, SAY_AGAIN, DELIVER_TWICE = 0.08, 0.05, 0.05
"""Shares of calls that take a vote back, give the same vote anew, and repeat a call that was answered."""
GIVE_UP = 0.1
"""Share of failed attempts after which a client does not try again."""
ANSWER_SECONDS = 35.0
"""A client that waited so long takes the answer for lost. Longer than the service works on a call, which is thus over."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 1.0
CHAT_PAUSE_SECONDS = 0.5
MOST_TOKENS = 12
STOP = ["a", "e", "i", "o"]
"""The tiny model hardly ever ends a reply by itself, and one that was cut off is not voted on."""
LOST = (aiohttp.ClientError, TimeoutError, OSError)


@dataclass(slots=True)
class Call:
    """A vote that was asked for: given, revised, or taken back."""

    choice: str | None
    """None: taken back."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    acknowledged: bool = False


@dataclass(slots=True)
class Voted:
    """A comparison, and all that its client asked for, in order."""

    id: str
    calls: list[Call] = field(default_factory=list)

    @property
    def choice(self) -> str | None:
        """What is acknowledged to be stored."""
        return next((call.choice for call in reversed(self.calls) if call.acknowledged), None)

    @property
    def in_doubt(self) -> Call | None:
        """The call that was given up, if any: always the last."""
        return self.calls[-1] if self.calls and not self.calls[-1].acknowledged else None


@dataclass(slots=True)
class Seen:
    """What a chat answer said, to its end or until it broke off. Lists are in the order shown."""

    comparison_id: str
    reply_ids: list[str] = field(default_factory=lambda: ["", ""])
    texts: list[str] = field(default_factory=lambda: ["", ""])
    finish_reasons: list[str | None] = field(default_factory=lambda: [None, None])
    votable: bool = False

    def add(self, event: dict[str, Any]) -> None:
        """What one more event says."""
        self.votable = self.votable or bool((event.get("comparison") or {}).get("votable"))
        for choice in event["choices"]:
            position = choice["index"]
            self.reply_ids[position] = choice.get("reply_id") or self.reply_ids[position]
            self.texts[position] += choice["delta"].get("content") or ""
            self.finish_reasons[position] = choice["finish_reason"]


@dataclass(slots=True)
class Tally:
    """What all clients together went through."""

    counts: Counter[str] = field(default_factory=Counter)
    acknowledged_at: list[float] = field(default_factory=list)
    """Times of acknowledged votes."""
    unexpected: list[str] = field(default_factory=list)
    """Answers that no good client should get."""


class Client:
    """One user, with comparisons that were shown to them."""

    def __init__(self, user: str, comparison_ids: Iterable[str], tally: Tally, seed: int) -> None:
        self.user = user
        self.voted = [Voted(comparison_id) for comparison_id in comparison_ids]
        self.seen: list[Seen] = []
        self._tally = tally
        self._chance = random.Random(f"{user} {seed}")

    async def vote_until(self, stop: asyncio.Event, http: aiohttp.ClientSession) -> None:
        """Vote, one call after the other. The last call is brought to its end."""
        while not stop.is_set():
            open_ones = [voted for voted in self.voted if voted.in_doubt is None]
            voted = self._chance.choice(open_ones)
            call = Call(self._next_choice(voted))
            voted.calls.append(call)
            if await self._insist(http, voted, call) and self._chance.random() < DELIVER_TWICE:
                await self._insist(http, voted, call)
                self._tally.counts["delivered twice"] += 1

    def _next_choice(self, voted: Voted) -> str | None:
        drawn = self._chance.random()
        if voted.choice is not None and drawn < TAKE_BACK:
            return None
        if voted.choice is not None and drawn < TAKE_BACK + SAY_AGAIN:
            return voted.choice
        return self._chance.choice([choice for choice in CHOICES if choice != voted.choice])

    async def _insist(self, http: aiohttp.ClientSession, voted: Voted, call: Call) -> bool:
        """Repeat the call until it is acknowledged. False where the client gave up first."""
        wait = FIRST_WAIT_SECONDS
        while True:
            retry_after = await self._attempt(http, voted, call)
            if call.acknowledged and retry_after is None:
                return True
            if not call.acknowledged and self._chance.random() < GIVE_UP:
                self._tally.counts["given up"] += 1
                return False
            await asyncio.sleep((retry_after or wait) * self._chance.uniform(0.5, 1))
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    async def _attempt(self, http: aiohttp.ClientSession, voted: Voted, call: Call) -> float | None:
        """One try. None where it was acknowledged, else how long the service asks to wait (0: it says nothing)."""
        try:
            if call.choice is None:
                answer = http.delete(f"/v1/comparisons/{voted.id}/vote", params={"user": self.user})
            else:
                body = {"choice": call.choice, "user": self.user}
                headers = {"idempotency-key": call.key}
                answer = http.put(f"/v1/comparisons/{voted.id}/vote", json=body, headers=headers)
            async with answer as response:
                text = await response.text()
                return self._note(voted, call, response, text)
        except aiohttp.ClientConnectorError:
            self._tally.counts["not reached"] += 1
            return 0.0
        except LOST:
            self._tally.counts["answers lost"] += 1
            return 0.0

    def _note(self, voted: Voted, call: Call, response: aiohttp.ClientResponse, text: str) -> float | None:
        counts = self._tally.counts
        if response.status == 503:
            counts["refused"] += 1
            return float(response.headers.get("retry-after", 0))
        right = response.status == 204 if call.choice is None else _is_for(call.choice, response, text)
        if not right:
            self._tally.unexpected.append(f"{response.status} to {call.choice}: {text[:200]}")
            return 0.0
        if not call.acknowledged:
            counts[
                "taken back" if call.choice is None else "given" if voted.choice is None else "revised"
            ] += 1
            self._tally.acknowledged_at.append(time.monotonic())
        call.acknowledged = True
        return None

    async def chat_until(self, stop: asyncio.Event, http: aiohttp.ClientSession) -> None:
        """Ask for comparisons, and vote on those that come."""
        while not stop.is_set():
            await self.compare(http)
            await asyncio.sleep(CHAT_PAUSE_SECONDS)

    async def compare(self, http: aiohttp.ClientSession) -> None:
        """Ask for one comparison, streamed, and remember all that the answer said."""
        try:
            async with http.post("/v1/chat/completions", json=self._question()) as response:
                if response.status == 200:
                    await self._read(response)
                else:
                    self._tally.counts["chats refused"] += 1
        except LOST:
            self._tally.counts["chats cut off"] += 1

    def _question(self) -> dict[str, Any]:
        return {
            "model": "ratchet",
            "user": self.user,
            "comparison": "always",
            "stream": True,
            "max_tokens": MOST_TOKENS,
            "stop": STOP,
            "messages": [{"role": "user", "content": f"What colour is number {self._chance.random()}?"}],
        }

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        """Raises aiohttp.ClientPayloadError where the stream ends in an error."""
        seen: Seen | None = None
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise aiohttp.ClientPayloadError(event["error"]["message"])
            if seen is None:
                seen = Seen(event["comparison"]["id"])
                self.seen.append(seen)
            seen.add(event)
        if seen is not None and seen.votable:
            self._tally.counts["comparisons"] += 1
            self.voted.append(Voted(seen.comparison_id))


def _is_for(choice: str, response: aiohttp.ClientResponse, text: str) -> bool:
    return response.status == 200 and bool(json.loads(text)["choice"] == choice)
