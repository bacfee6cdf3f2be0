"""How simulated users reach Ratchet: its HTTP API, streamed, as any client would; and what they count there.

Knows nothing of the database or of training. Used by `simulated_users.py` and `simulate.py`.
"""

import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import aiohttp

from service.tables import Message

ALIAS = "ratchet"
MAX_TOKENS = 64
"""Longest reply that a simulated user waits for, in tokens; twice what the starter's demonstrations need."""
TIMEOUT_SECONDS = 180.0
MOST_FAILURES = 50
"""Failed requests after which the demo gives up: the loop is broken, and more would say nothing new."""


class DemoError(Exception):
    """The demo cannot go on. The message is for the terminal."""


class RequestFailed(Exception):
    """One request was not answered as it must be; counted, not raised further."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply, whole."""

    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back on one chat request: one reply, or two and the comparison to vote on."""

    replies: tuple[Reply, ...]
    policy: str | None
    """From header `x-ratchet-policy`; None in a comparison."""
    models: frozenset[str]
    """Every `model` that the chunks named: one, or the answer came from two policies."""
    comparison_id: str | None


NOT_VOTABLE = ("replies_alike", "comparison_cut_off")
"""Codes of comparisons that the service does not offer for a vote."""


@dataclass(slots=True)
class Tally:
    """What went right and wrong over a whole run, counted from outside."""

    requests: int = 0
    """Chat requests and votes."""
    failures: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    """Answers that were not of exactly the one policy that they should be of."""
    in_flight_at_swaps: list[int] = field(default_factory=list)
    """Chat requests that had begun and not ended when the pointer moved, per swap."""
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each chat request, in seconds since 1970."""

    @property
    def is_clean(self) -> bool:
        return not self.failures and not self.mixed

    def note_swap(self, moment: datetime) -> None:
        """Count what was in flight at a swap; call once the requests of that time have ended."""
        at = moment.timestamp()
        self.in_flight_at_swaps.append(sum(began <= at <= ended for began, ended in self.spans))


class Client:
    """All requests of the simulated users. Those that fail are counted in `tally` and answered with None."""

    def __init__(self, session: aiohttp.ClientSession, tally: Tally) -> None:
        """`session` has the service's address as its base URL."""
        self._session = session
        self._held: set[str] = set()
        self.tally = tally

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        user: str,
        model: str = ALIAS,
        comparison: str = "never",
        seed: int | None = None,
    ) -> Answer | None:
        """Ask, streamed. Raises DemoError after too many failures."""
        body = {
            "model": model,
            "messages": list(messages),
            "user": user,
            "comparison": comparison,
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "stream": True,
        } | ({} if seed is None else {"seed": seed})
        began = time.time()
        with self._counting("chat"):
            try:
                answer = await self._chat(body)
            finally:
                self.tally.spans.append((began, time.time()))
            self._check_policy(answer, model)
            return answer
        return None

    async def _chat(self, body: dict[str, Any]) -> Answer:
        async with self._session.post("/v1/chat/completions", json=body) as response:
            await _check_status(response)
            return await _read_answer(response, comparison=body["comparison"] == "always")

    def _check_policy(self, answer: Answer, model: str) -> None:
        """A plain reply is of one policy, the one that its header names (and that was asked for by name)."""
        right = answer.policy is not None if answer.comparison_id is None else answer.policy is None
        expected = ALIAS if answer.comparison_id else answer.policy
        if not right or answer.models != {expected} or model not in (ALIAS, answer.policy):
            self.tally.mixed.append(
                f"asked {model}, header {answer.policy}, chunks {', '.join(sorted(answer.models))}"
            )

    async def vote(self, comparison_id: str, choice: str, *, user: str) -> bool:
        """Whether the vote was taken: one on replies that are not worth a vote is not, and that is no failure."""
        with self._counting("vote"):
            path = f"/v1/comparisons/{comparison_id}/vote"
            async with self._session.put(path, json={"choice": choice, "user": user}) as response:
                if response.status == 409 and (await response.json())["error"]["code"] in NOT_VOTABLE:
                    return False
                await _check_status(response)
                policies = set((await response.json())["policies"])
            await self._check_compared(policies)
            return True
        return False

    async def _check_compared(self, policies: set[str]) -> None:
        """A comparison is between policies that the deployment held at some time of this run."""
        if not policies <= self._held:
            await self.read_deployment()
        if not policies <= self._held:
            self.tally.mixed.append(f"a comparison of {', '.join(sorted(policies))}: not all were ever live")

    async def read_deployment(self) -> dict[str, Any]:
        """The pointer. Raises DemoError."""
        deployment: dict[str, Any] = await self.operate("GET", "/operator/deployment")
        names = (deployment["live"], deployment["previous"], deployment["challenger"])
        self._held |= {name for name in names if name is not None}
        return deployment

    async def operate(self, method: str, path: str, *, allow: int | None = None) -> Any:
        """An operator's request; None where it was answered by status `allow`. Raises DemoError."""
        try:
            async with self._session.request(method, path) as response:
                if response.status == allow:
                    return None
                await _check_status(response)
                return await response.json()
        except (aiohttp.ClientError, TimeoutError, RequestFailed) as error:
            raise DemoError(f"{method} {path} failed: {_describe(error)}") from error

    @contextmanager
    def _counting(self, kind: str) -> Iterator[None]:
        """Count one request, and swallow its failure once it is noted."""
        self.tally.requests += 1
        try:
            yield
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, RequestFailed) as error:
            self.tally.failures.append(f"{kind}: {_describe(error)}")
            if len(self.tally.failures) >= MOST_FAILURES:
                raise DemoError(
                    f"{MOST_FAILURES} requests failed, the last one so: {self.tally.failures[-1]}"
                ) from error


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status >= 400:
        raise RequestFailed(f"status {response.status}: {(await response.text())[:200]}")


async def _read_answer(response: aiohttp.ClientResponse, *, comparison: bool) -> Answer:
    """Read a stream to its end. Raises RequestFailed where it breaks off, or a reply in it is not whole."""
    num_replies = 2 if comparison else 1
    texts: list[list[str]] = [[] for _ in range(num_replies)]
    reasons: list[str | None] = [None] * num_replies
    models: set[str] = set()
    comparison_id: str | None = None
    async for chunk in _events(response):
        models.add(chunk["model"])
        comparison_id = chunk.get("comparison", {}).get("id", comparison_id)
        for choice in chunk["choices"]:
            if not 0 <= choice["index"] < num_replies:
                raise RequestFailed(f"a reply of index {choice['index']} was not asked for")
            texts[choice["index"]].append(choice["delta"].get("content") or "")
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    whole = tuple(
        Reply("".join(text), reason)
        for text, reason in zip(texts, reasons, strict=True)
        if reason is not None
    )
    if len(whole) != num_replies or (comparison_id is not None) != comparison:
        raise RequestFailed("the stream ended before the replies did")
    return Answer(whole, response.headers.get("x-ratchet-policy"), frozenset(models), comparison_id)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream. Raises RequestFailed for an error among them, or where [DONE] never comes."""
    async for line in response.content:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            return
        if data:
            chunk: dict[str, Any] = json.loads(data)
            if "error" in chunk:
                raise RequestFailed(f"the stream ended in an error: {chunk['error']['message']}")
            yield chunk
    raise RequestFailed("the stream broke off")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
