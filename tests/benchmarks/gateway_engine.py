"""A mock vLLM: every reply is 64 tokens, each chunk of them written by itself, as fast as they are read.

A chunk is one token, or as many as the request's `stream_interval` asks for, the first token and the end coming at once: vLLM 0.32's
own rule. With `--one-by-one` it is one token whatever is asked, as of an engine that knows no such field.

Stands behind the gateways in `gateway.py`, which needs it to be faster than all of them: bytes made beforehand, written by
an `asyncio.Protocol` on uvloop. It speaks what a gateway asks of a vLLM (chat, streamed or not; one token of a
completion; models; adapters), and nothing else depends on what a request says.

    python -m tests.benchmarks.gateway_engine PORT [--one-by-one]
"""

import asyncio
import json
import re
import sys
from functools import lru_cache, partial
from typing import Any, cast

import uvloop

MODEL = "policy-000000"
WORD = "lemon"
"""Every token's text. It occurs nowhere else in an answer or a request, so that whoever counts it counts tokens."""
TOKENS = 64
PROMPT_TOKENS = 16
CONTEXT_TOKENS = 4096
CREATED = 1_767_225_600
CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
HEAD_END = b"\r\n\r\n"
ONE_BY_ONE = "--one-by-one"


class Connection(asyncio.Protocol):
    """One client's connection, kept alive. Requests are answered one after the other."""

    def __init__(self, *, one_by_one: bool = False) -> None:
        self._one_by_one = one_by_one
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._frames: list[bytes] = []
        self._next = 0
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, and no subclass

    def data_received(self, data: bytes) -> None:
        self._received += data
        head_end = self._received.find(HEAD_END)
        if head_end < 0:
            return
        length = CONTENT_LENGTH.search(self._received, 0, head_end)
        end = head_end + len(HEAD_END) + (int(length[1]) if length else 0)
        if len(self._received) < end:
            return
        path = self._received.split(b" ", 2)[1].decode()
        body = bytes(self._received[head_end + len(HEAD_END) : end])
        del self._received[:end]
        self._answer(path, json.loads(body) if body else {})

    def _answer(self, path: str, body: dict[str, Any]) -> None:
        if path == "/v1/chat/completions" and body.get("stream"):
            options = body.get("stream_options") or {}
            usage, running = bool(options.get("include_usage")), bool(options.get("continuous_usage_stats"))
            interval = 1 if self._one_by_one else body.get("stream_interval", 1)
            self._frames, self._next = stream(body["model"], usage, running, interval), 0
            self._write_next()
        else:
            self._transport.write(answer(path, body.get("model", MODEL)))

    def _write_next(self) -> None:
        """One chunk in each turn of the loop: uvloop would join what is written in one turn into one packet."""
        if self._paused or self._transport.is_closing():
            return
        self._transport.write(self._frames[self._next])
        self._next += 1
        if self._next < len(self._frames):
            self._loop.call_soon(self._write_next)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._next < len(self._frames):
            self._write_next()


@lru_cache
def answer(path: str, model: str) -> bytes:
    """A whole HTTP response to anything that is not streamed."""
    answers: dict[str, object] = {
        "/health": {},
        "/v1/models": {"object": "list", "data": [_card()]},
        "/v1/chat/completions": _completion(model),
        "/v1/completions": _one_token(model),
        "/v1/load_lora_adapter": {},
        "/v1/unload_lora_adapter": {},
    }
    status = b"200 OK" if path in answers else b"404 Not Found"
    body = _json(answers.get(path, {"error": {"message": "no such path", "type": "NotFound", "code": 404}}))
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


@lru_cache
def stream(model: str, usage: bool, running_usage: bool, interval: int) -> list[bytes]:
    """The writes of one streamed reply, in vLLM's order: role, text, usage if asked for, [DONE]."""
    events = [_chunk(model, {"role": "assistant", "content": ""}, None, 0 if running_usage else None)]
    sent = 0
    for count in [*range(1, TOKENS, interval), TOKENS]:
        text, reason = f"{WORD} " * (count - sent), "stop" if count == TOKENS else None
        events.append(_chunk(model, {"content": text}, reason, count if running_usage else None))
        sent = count
    if usage:
        events.append(_chunk_of(model, []) | {"usage": _usage(TOKENS)})
    frames = [_frame(b"data: " + _json(event) + b"\n\n") for event in events]
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    return [head + frames[0], *frames[1:], _frame(b"data: [DONE]\n\n") + b"0\r\n\r\n"]


def _chunk(model: str, delta: dict[str, str], reason: str | None, tokens: int | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return _chunk_of(model, [choice]) | ({} if tokens is None else {"usage": _usage(tokens)})


def _chunk_of(model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = "chat.completion.chunk"
    return {"id": "chatcmpl-mock", "object": kind, "created": CREATED, "model": model, "choices": choices}


def _completion(model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"{WORD} " * TOKENS}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    chunk = _chunk_of(model, [choice])
    return chunk | {"object": "chat.completion", "usage": _usage(TOKENS)}


def _one_token(model: str) -> dict[str, Any]:
    choice = {"index": 0, "text": "a", "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0]}}
    return _chunk_of(model, [choice]) | {"object": "text_completion", "usage": _usage(1)}


def _usage(tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
    }


def _card() -> dict[str, Any]:
    return {
        "id": MODEL,
        "object": "model",
        "created": CREATED,
        "owned_by": "mock",
        "max_model_len": CONTEXT_TOKENS,
    }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _frame(data: bytes) -> bytes:
    """One piece of HTTP's chunked encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _serve(port: int, *, one_by_one: bool) -> None:
    connection = partial(Connection, one_by_one=one_by_one)
    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), one_by_one=ONE_BY_ONE in sys.argv[2:]))
