"""A small service that simulated users can talk to: it answers, stores votes and runs cycles as it is told."""

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

STAGES = ("snapshot", "ppo", "gate", "swap")


@dataclass
class FakeService:
    """Its live policy says `replies[policy]`: two texts, of which a plain request gets the first."""

    replies: dict[str, tuple[str, str]] = field(default_factory=lambda: {"policy-000000": ("a", "b")})
    live: str = "policy-000000"
    cycle_votes: int = 1_000_000
    verdict: str = "promoted"
    """How every cycle ends."""
    fail: set[int] = field(default_factory=set)
    """Numbers of chat requests, from 0, that are answered by status 503."""
    break_off: set[int] = field(default_factory=set)
    """Those whose stream ends in an error."""
    mix: set[int] = field(default_factory=set)
    """Those in which the last chunk names another policy."""
    strange_votes: bool = False
    """Votes are answered with a policy that was never live."""
    chats: list[dict[str, Any]] = field(default_factory=list)
    votes: list[tuple[str, str, str]] = field(default_factory=list)
    """(comparison, user, choice)"""
    cycles: list[dict[str, Any]] = field(default_factory=list)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A session whose base is this service, served on a port of its own."""
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.put("/v1/comparisons/{id}/vote", self._vote),
                web.get("/operator/deployment", self._deployment),
                web.get("/operator/cycles", self._list_cycles),
                web.post("/operator/cycles", self._start_cycle),
                web.get("/operator/cycles/{id}", self._cycle),
            ]
        )
        async with TestServer(app) as server, aiohttp.ClientSession(base_url=server.make_url("/")) as session:
            yield session

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        number, body = len(self.chats), await request.json()
        self.chats.append(body)
        if number in self.fail:
            return web.json_response({"error": {"message": "away", "code": None}}, status=503)
        compared = body["comparison"] == "always"
        policy = self.live if body["model"] == "ratchet" else body["model"]
        name = "ratchet" if compared else policy
        response = web.StreamResponse(headers={} if compared else {"x-ratchet-policy": policy})
        await response.prepare(request)
        texts = self.replies[policy] if compared else self.replies[policy][:1]
        for index, text in enumerate(texts):
            chunk: dict[str, Any] = {"model": name, "choices": [_choice(index, text, None)]}
            await _send(response, chunk | ({"comparison": {"id": f"cmp-{number}"}} if compared else {}))
        if number in self.break_off:
            await _send(response, {"error": {"message": "the engine went away"}})
            return response
        for index in range(len(texts)):
            other = {"model": "policy-000009"} if number in self.mix else {"model": name}
            await _send(response, other | {"choices": [_choice(index, "", "stop")]})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _vote(self, request: web.Request) -> web.Response:
        comparison_id, body = request.match_info["id"], await request.json()
        first, second = self.replies[self.live]
        if first == second:
            error = {"message": "identical", "code": "replies_alike"}
            return web.json_response({"error": error}, status=409)
        self.votes.append((comparison_id, body["user"], body["choice"]))
        if len(self.votes) % self.cycle_votes == 0:
            self._begin("votes")
        policy = "policy-000077" if self.strange_votes else self.live
        return web.json_response({"policies": [policy, policy]})

    async def _deployment(self, request: web.Request) -> web.Response:
        deployment = {"live": self.live, "previous": None, "challenger": None}
        return web.json_response(deployment | {"changed_at": datetime.now(UTC).isoformat()})

    async def _list_cycles(self, request: web.Request) -> web.Response:
        return web.json_response(self.cycles[::-1])

    async def _start_cycle(self, request: web.Request) -> web.Response:
        return web.json_response(self._begin("operator"), status=201)

    def _begin(self, trigger: str) -> dict[str, Any]:
        number = len(self.cycles) + 1
        cycle = {"id": number, "trigger": trigger, "stage": "requested", "policy": None, "reason": None}
        self.cycles.append(cycle | {"metrics": {}})
        return self.cycles[-1]

    async def _cycle(self, request: web.Request) -> web.Response:
        """Each look moves it one stage on."""
        cycle = self.cycles[int(request.match_info["id"]) - 1]
        at = STAGES.index(cycle["stage"]) + 1 if cycle["stage"] in STAGES else 0
        if at < len(STAGES):
            cycle["stage"] = STAGES[at]
        elif cycle["stage"] != self.verdict:
            cycle |= {"stage": self.verdict, "reason": "as told"}
            if self.verdict == "promoted":
                cycle["policy"] = self.live = f"policy-{cycle['id']:06d}"
        return web.json_response(cycle)

    def users(self) -> Counter[str]:
        """How often each user voted."""
        return Counter(user for _, user, _ in self.votes)


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "finish_reason": finish_reason}


async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
