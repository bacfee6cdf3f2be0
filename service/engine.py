"""The only door to vLLM. Speaks its HTTP API; knows nothing of users, comparisons or the database.

A request body is built anew from the fields named here, so nothing that a client sends gets there unseen.
Used by `fleet.py` (health, loading, probing) and `chat.py` (generation).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol

import aiohttp
import msgspec

from service.errors import (
    BadRequest,
    DeadlineExceeded,
    EngineGone,
    EngineUnavailable,
    EngineUnreachable,
    PolicyNotLoaded,
    PolicyRefused,
    RatchetError,
)

CONNECT_SECONDS = 2.0
KEEP_SECONDS = 3.0
"""An idle connection is kept for: vLLM closes one after 5 s, and a request sent just then would be lost."""
CONTROL_SECONDS = 10.0
"""For questions that need no generation."""
TOKEN_SECONDS = 30.0
"""For one token: a busy engine, or one that compiles a kernel, takes long; a hung one takes for ever."""
LOAD_SECONDS = 120.0
READ_BYTES = 1 << 18
JSON_HEADERS = {"content-type": "application/json"}
FINISHED = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is drawn; stored with it. `max_tokens` counts reply tokens."""

    max_tokens: int
    temperature: float
    top_p: float
    min_p: float
    """Tokens less likely than this share of the likeliest one are never drawn."""
    stop: tuple[str, ...]
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    logprobs: int | None = None
    """How many alternatives to report per token; None reports no log-probabilities at all."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, text only."""

    role: str
    content: str


class Piece(NamedTuple):
    """What one engine chunk adds to one of its replies; token counts are those of that reply so far."""

    reply: int
    """Which of the engine's replies, from 0."""
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    model: str
    logprobs: bytes | None = None
    """OpenAI's `logprobs` object of this piece, as JSON."""


@dataclass(frozen=True, slots=True)
class Models:
    """What an engine holds now."""

    names: frozenset[str]
    context_tokens: int


class Engine(Protocol):
    """One replica, as the rest of the service sees it. Methods raise EngineUnavailable where they fail."""

    url: str

    def generate(
        self,
        policy: str,
        messages: Sequence[Message],
        sampling: Sampling,
        count: int,
        *,
        stream: bool,
        deadline: float,
    ) -> AbstractAsyncContextManager[AsyncIterator[list[Piece]]]:
        """Entered: the engine took the request (else BadRequest, PolicyNotLoaded). Leaving aborts it.

        Gives the pieces that came at once together. Not streamed (one reply only), entering waits for the whole.
        deadline: by the loop's clock; waiting for a piece past it raises DeadlineExceeded.
        """

    async def models(self) -> Models:
        """The base and the adapters that it can answer with."""

    def forget(self) -> None:
        """Ask anew what it holds: another process may have changed that."""

    async def complete_one(self, policy: str) -> None:
        """Generate one token: the only proof that an engine still works."""

    async def load(self, policy: str, path: str) -> None:
        """Load an adapter under a fresh name. Raises PolicyRefused where the engine cannot take it."""

    async def unload(self, policy: str) -> None:
        """Forget an adapter."""

    async def logprob(self, policy: str, prefix: list[int], token: int) -> float:
        """Log-probability (nats, temperature 1) of `token` after `prefix`."""

    def drop(self) -> None:
        """End every generation under way with EngineGone: the replica gives no tokens any more, although it keeps its connections."""

    async def metrics(self) -> str:
        """Its own metrics, in Prometheus' text format."""


def engine_connector() -> aiohttp.TCPConnector:
    """Connections to engines: as many as there are requests, kept for the next ones."""
    return aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS)


class VllmEngine:
    """A vLLM replica reached over HTTP. `url` has no trailing slash."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._opening: set[asyncio.Timeout] = set()
        """Of requests that have no answer yet."""
        self._answering: set[aiohttp.StreamReader] = set()

    @asynccontextmanager
    async def generate(
        self,
        policy: str,
        messages: Sequence[Message],
        sampling: Sampling,
        count: int,
        *,
        stream: bool,
        deadline: float,
    ) -> AsyncIterator[AsyncIterator[list[Piece]]]:
        body = _body(self._served_name(policy), messages, sampling, count, stream) | {"cache_salt": policy}
        response = await self._open("/v1/chat/completions", body)
        # One alarm for the whole reply: a timeout around each read cost a tenth of a streamed token's time.
        alarm = asyncio.get_running_loop().call_at(
            deadline,
            response.content.set_exception,
            DeadlineExceeded("The answer took too long. Ask for fewer tokens."),
        )
        self._answering.add(response.content)
        try:
            if response.status != HTTPStatus.OK:
                raise _refusal(response.status, _message_of(await response.text()), policy)
            yield _pieces(response.content) if stream else _only(_whole(await _read(response)))
        finally:
            self._answering.discard(response.content)
            alarm.cancel()
            response.close()  # before the end: vLLM sees it and aborts the generation

    async def _open(self, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        try:
            async with asyncio.timeout(None) as limit:
                self._opening.add(limit)
                try:
                    return await self._session.post(
                        self.url + path,
                        data=msgspec.json.encode(body),
                        headers=JSON_HEADERS,
                        timeout=timeout,
                        read_bufsize=READ_BYTES,
                    )
                finally:
                    self._opening.discard(limit)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _gone(error) from error

    def forget(self) -> None:
        """Nothing is remembered: it is asked each time."""

    def drop(self) -> None:
        opening, self._opening = self._opening, set()
        for limit in opening:
            limit.reschedule(0)
        for content in self._answering:
            content.set_exception(EngineGone("The engine stopped answering. Try again."))

    async def models(self) -> Models:
        cards = (await self._call("GET", "/v1/models"))["data"]
        return Models(
            names=frozenset(card["id"] for card in cards),
            context_tokens=max(card.get("max_model_len") or 0 for card in cards),
        )

    async def complete_one(self, policy: str) -> None:
        body = {"model": self._served_name(policy), "prompt": [1], "max_tokens": 1, "cache_salt": policy}
        await self._call("POST", "/v1/completions", body, TOKEN_SECONDS)

    async def load(self, policy: str, path: str) -> None:
        body = {"lora_name": policy, "lora_path": path}
        status, answer = await self._send("POST", "/v1/load_lora_adapter", body, LOAD_SECONDS)
        if status != HTTPStatus.OK and "already been loaded" not in answer:
            raise PolicyRefused(f"the engine could not load it: {_message_of(answer)}")

    async def unload(self, policy: str) -> None:
        await self._send("POST", "/v1/unload_lora_adapter", {"lora_name": policy}, CONTROL_SECONDS)

    async def logprob(self, policy: str, prefix: list[int], token: int) -> float:
        # Not `prompt_logprobs`: with an adapter it ends the whole engine in vLLM's CPU build, and leaves out
        # lm_head's adapter on GPUs (vLLM issues 16668 and 51594). `allowed_token_ids` forces the token; the
        # log-probability that comes back is the model's own, from before that mask.
        body = {
            "model": self._served_name(policy),
            "prompt": prefix,
            "max_tokens": 1,
            "allowed_token_ids": [token],
            "logprobs": 0,
            "temperature": 1.0,
            "cache_salt": policy,
        }
        answer = await self._call("POST", "/v1/completions", body, TOKEN_SECONDS)
        return float(answer["choices"][0]["logprobs"]["token_logprobs"][0])

    async def metrics(self) -> str:
        status, answer = await self._send("GET", "/metrics", None, CONTROL_SECONDS)
        if status != HTTPStatus.OK:
            raise EngineUnavailable(f"The engine answered {status} to /metrics.")
        return answer

    def _served_name(self, policy: str) -> str:
        """What the engine calls a policy."""
        return policy

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float = CONTROL_SECONDS
    ) -> Any:
        status, answer = await self._send(method, path, body, seconds)
        if status != HTTPStatus.OK:
            raise EngineUnavailable(f"The engine answered {status} to {path}: {_message_of(answer)}")
        return json.loads(answer)

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None, seconds: float
    ) -> tuple[int, str]:
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                return response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _gone(error) from error


def _gone(error: Exception) -> EngineGone:
    unreachable = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    kind = EngineUnreachable if unreachable else EngineGone
    return kind(f"The engine did not answer ({type(error).__name__}). Try again.")


def _body(
    model: str, messages: Sequence[Message], sampling: Sampling, count: int, stream: bool
) -> dict[str, Any]:
    """What the engine is asked. Nothing else of a client's request gets there."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "stop": sampling.stop,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "n": count,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    return body


class _Text(msgspec.Struct, frozen=True):
    content: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


NO_USAGE = _Usage()


class _Choice(msgspec.Struct):
    """Of a stream (`delta`) or of a whole answer (`message`)."""

    index: int
    delta: _Text = _Text()
    message: _Text = _Text()
    finish_reason: str | None = None
    logprobs: msgspec.Raw = msgspec.Raw(b"null")


class _Answer(msgspec.Struct):
    """What is read of an engine's answer or chunk; an error has only `error`."""

    model: str = ""
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Answer).decode
DONE = b"[DONE]"
MOST_AT_ONCE = 64
"""Chunks that are handed on together where many have come."""


async def _pieces(content: aiohttp.StreamReader) -> AsyncIterator[list[Piece]]:
    """The chunks of one SSE stream, as they come. Raises EngineUnavailable for an error, an abort, an early end."""
    rest = b""
    most = 1  # the first token goes on at once, however much has come with it
    while received := await _received(content):
        *events, rest = (rest + received).split(b"\n\n")
        while events:
            pieces, whole = _read_events(events[:most])
            if pieces:
                yield pieces
            if whole:
                with suppress(RatchetError):  # the reply is whole, whatever comes now
                    await _received(content)  # the end of the body: the connection can serve the next request
                return
            del events[:most]
            if any(piece.text for piece in pieces):
                most = MOST_AT_ONCE
    raise EngineGone("The engine went away while it was answering. Try again.")


def _read_events(events: Sequence[bytes]) -> tuple[list[Piece], bool]:
    """What server-sent events say, and whether the stream has come to its end."""
    pieces: list[Piece] = []
    for event in events:
        data = event.removeprefix(b"data:").strip()
        if data == DONE:
            return pieces, True
        if data and not data.startswith(b":"):
            pieces += _whole(data)
    return pieces, False


async def _received(content: aiohttp.StreamReader) -> bytes:
    """What has come since, at least one byte; nothing at the end."""
    try:
        return await content.readany()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise _gone(error) from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    try:
        return await response.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise _gone(error) from error


async def _only(pieces: list[Piece]) -> AsyncIterator[list[Piece]]:
    yield pieces


def _whole(data: bytes) -> list[Piece]:
    """The pieces of one chunk, or of a whole answer."""
    try:
        answer = _decode(data)
    except msgspec.DecodeError:
        raise EngineUnavailable("The engine gave an answer that cannot be read. Try again.") from None
    if answer.error is not None:
        raise EngineUnavailable("The engine failed while it was answering. Try again.")
    return [_piece(answer, choice) for choice in answer.choices]


def _piece(answer: _Answer, choice: _Choice) -> Piece:
    reason = choice.finish_reason
    if reason is not None and reason not in FINISHED:
        raise EngineUnavailable("The engine stopped before the answer was whole. Try again.")
    usage = answer.usage or NO_USAGE
    logprobs = bytes(choice.logprobs)
    return Piece(
        choice.index,
        # PostgreSQL cannot hold NUL
        (choice.delta.content or choice.message.content or "").replace("\0", "\ufffd"),
        reason,
        usage.prompt_tokens,
        usage.completion_tokens or 0,
        answer.model,
        None if logprobs == b"null" else logprobs,
    )


def _refusal(status: int, message: str, policy: str) -> BadRequest | EngineUnavailable:
    """The error for a request that the engine did not take."""
    if status == HTTPStatus.NOT_FOUND:
        return PolicyNotLoaded(f"{policy} is being loaded. Try again in a moment.")
    if status != HTTPStatus.BAD_REQUEST:
        return EngineUnavailable(f"The engine answered {status}. Try again.")
    if "context length" in message:
        return BadRequest(message, param="messages", code="context_length_exceeded")
    return BadRequest(f"The model cannot take this request: {message}", param="messages")


def _message_of(answer: str) -> str:
    """The message of an error in OpenAI's shape, else the start of the text; one line."""
    with suppress(ValueError, KeyError, TypeError):
        answer = str(json.loads(answer)["error"]["message"])
    return " ".join(answer.split())[:500]
