"""A vLLM's HTTP and nothing behind it: for faults of the connection, and for services that run in processes of their own.

Every call can be made to wait, so that a test can act at just that step.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from service.policies import BASE

LOOK_SECONDS = 0.02


class HttpEngine:
    """Steps that can be held: `models`, `token` (the one that shows health), `probe`, `load`, `unload`, `chat` (before its first word)
    and `word` (before its last one)."""

    def __init__(self) -> None:
        self.url = ""
        self.held = {BASE}
        self.done: list[tuple[str, str]] = []
        """What was loaded and unloaded."""
        self.chats: list[dict[str, Any]] = []
        """What was asked of it."""
        self.completions: list[dict[str, Any]] = []
        """The same, of token ids."""
        self.says: dict[str, str] = {}
        """By path: a text that it answers with instead, as if all were well."""
        self._holding: set[str] = set()
        self._reached: dict[str, threading.Event] = {}

    def hold(self, *steps: str) -> None:
        """Let calls wait at these steps until they are released."""
        for step in steps:
            self._reached[step] = threading.Event()
        self._holding |= set(steps)

    def release(self) -> None:
        self._holding.clear()

    def wait_until_reached(self, step: str, seconds: float = 120) -> None:
        assert self._reached[step].wait(seconds), f"nobody came to {step}"

    async def _pass(self, step: str) -> None:
        if step in self._holding:
            self._reached[step].set()
        while step in self._holding:
            await asyncio.sleep(LOOK_SECONDS)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._answer_instead])
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    @web.middleware
    async def _answer_instead(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        found = self.says.get(request.path)
        return await handler(request) if found is None else web.Response(text=found)

    async def _models(self, request: web.Request) -> web.Response:
        await self._pass("models")
        return web.json_response({"data": [{"id": name, "max_model_len": 512} for name in sorted(self.held)]})

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.completions.append(body)
        await self._pass("probe" if "allowed_token_ids" in body else "token")
        logprob = -1.0 if body["model"] == BASE else -2.0
        return web.json_response({"choices": [{"text": "x", "logprobs": {"token_logprobs": [logprob]}}]})

    async def _load(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        await self._pass("load")
        self.done.append(("load", name))
        self.held.add(name)
        return web.Response(text="loaded")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        await self._pass("unload")
        self.done.append(("unload", name))
        self.held.discard(name)
        return web.Response(text="unloaded")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.chats.append(body)
        if body["model"] not in self.held:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if not body.get("stream"):
            await self._pass("chat")
            return web.json_response(_answer(body["model"], "message", "one two", "stop"))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)  # vLLM too sends its headers before it generates
        await self._pass("chat")
        await response.write(_event(_answer(body["model"], "delta", "one ", None)))
        await self._pass("word")
        await response.write(_event(_answer(body["model"], "delta", "two", "stop")))
        await response.write(b"data: [DONE]\n\n")
        return response


def _answer(model: str, kind: str, text: str, finish_reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, kind: {"content": text}, "finish_reason": finish_reason}
    return {"model": model, "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def _event(answer: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(answer).encode() + b"\n\n"


@contextmanager
def running_http_engine() -> Iterator[HttpEngine]:
    """One that answers, in a thread of its own."""
    engine = HttpEngine()
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(engine.application(), shutdown_timeout=1.0)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result(120)
        yield engine
    finally:
        engine.release()
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(120)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
