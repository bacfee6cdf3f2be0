"""The only door to vLLM. Speaks its HTTP API; knows nothing of users, comparisons or the database.

A request body is built anew from the fields named here, so nothing that a client sends gets there unseen.
Used by `fleet.py` (health, loading, probing), `chat.py` (generation) and the trainer (rollouts).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Generic, Protocol, TypeVar

import aiohttp
import msgspec

from service.errors import (
    BadRequest,
    DeadlineExceeded,
    EngineGone,
    EngineUnavailable,
    PolicyNotLoaded,
    PolicyRefused,
)
from service.pace import Pace
from service.pieces import FINISHED, Piece, gone, only, pieces, read_whole

CONNECT_SECONDS = 2.0
KEEP_SECONDS = 3.0
"""An idle connection is kept for: vLLM closes one after 5 s, and a request sent just then would be lost."""
CONTROL_SECONDS = 10.0
"""For questions that need no generation."""
TOKEN_SECONDS = 30.0
"""For one token: a busy engine, or one that compiles a kernel, takes long; a hung one takes for ever."""
LOAD_SECONDS = 120.0
COMPLETION_SECONDS = 120.0
"""For a whole completion, the time in which others go first included."""
READ_BYTES = 1 << 18
CHUNK_SECONDS = 0.04
"""A stream comes in chunks of about so long after its first token: a token by itself costs as much as several together, here and in
vLLM's own server."""
JSON_HEADERS = {"content-type": "application/json"}


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


@dataclass(frozen=True, slots=True)
class Models:
    """What an engine holds now."""

    names: frozenset[str]
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole reply, by its tokens."""

    token_ids: list[int]
    """With the one that ended it."""
    logprobs: list[float]
    """Nats, of each token."""


Choice = TypeVar("Choice")


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    """Of the base alone."""


class _Cards(msgspec.Struct):
    data: Annotated[list[_Card], msgspec.Meta(min_length=1)]


class _Logprobs(msgspec.Struct):
    token_logprobs: Annotated[list[float], msgspec.Meta(min_length=1)]


class _Scored(msgspec.Struct):
    logprobs: _Logprobs


class _Drawn(_Scored):
    finish_reason: str
    token_ids: list[int]


class _Completions(msgspec.Struct, Generic[Choice]):
    choices: Annotated[list[Choice], msgspec.Meta(min_length=1)]


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

    async def complete(
        self, policy: str, prompt: list[int], *, max_tokens: int, end_ids: Sequence[int], priority: int
    ) -> Completion:
        """A reply drawn at temperature 1, to a prompt of token ids. priority: the larger, the later; users' requests have 0."""

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
        self._pace = Pace()

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
        body = _body(self._served_name(policy), messages, sampling, count) | {"cache_salt": policy}
        if stream:
            body |= _streamed(self._pace.tokens_in(CHUNK_SECONDS))
        response = await self._open("/v1/chat/completions", body)
        # One alarm for the whole reply: a timeout around each read cost a tenth of a streamed token's time.
        alarm = asyncio.get_running_loop().call_at(
            deadline,
            _end,
            response.content,
            DeadlineExceeded("The answer took too long. Ask for fewer tokens."),
        )
        self._answering.add(response.content)
        try:
            if response.status != HTTPStatus.OK:
                raise _refusal(response.status, _message_of(await response.text()), policy)
            if stream:
                yield pieces(response.content, count, self._pace)
            else:
                yield only(await read_whole(response))
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
            raise gone(error) from error

    def forget(self) -> None:
        """Nothing is remembered: it is asked each time."""

    def drop(self) -> None:
        opening, self._opening = self._opening, set()
        for limit in opening:
            limit.reschedule(0)
        for content in self._answering:
            _end(content, EngineGone("The engine stopped answering. Try again."))

    async def models(self) -> Models:
        found: _Cards = await self._call("GET", "/v1/models", wanted=_Cards)
        return Models(
            names=frozenset(card.id for card in found.data),
            context_tokens=max(card.max_model_len or 0 for card in found.data),
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
        wanted = _Completions[_Scored]
        found: _Scored = (await self._call("POST", "/v1/completions", body, TOKEN_SECONDS, wanted)).choices[0]
        return found.logprobs.token_logprobs[0]

    async def complete(
        self, policy: str, prompt: list[int], *, max_tokens: int, end_ids: Sequence[int], priority: int
    ) -> Completion:
        body = {
            "model": self._served_name(policy),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 1.0,  # what vLLM reports are log-probabilities at 1, whatever it draws at
            "top_p": 1.0,  # else these four may be what a model's own configuration says
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,  # these tokens end a reply, and no others
            "stop_token_ids": list(end_ids),
            "priority": priority,
            "cache_salt": policy,
        }
        wanted = _Completions[_Drawn]
        found: _Drawn = (
            await self._call("POST", "/v1/completions", body, COMPLETION_SECONDS, wanted)
        ).choices[0]
        token_ids, logprobs = found.token_ids, found.logprobs.token_logprobs
        if found.finish_reason not in FINISHED:
            raise EngineUnavailable("The engine stopped before the answer was whole. Try again.")
        if len(token_ids) != len(logprobs):
            raise EngineUnavailable(
                f"The engine gave {len(token_ids)} tokens, and log-probabilities of {len(logprobs)}."
            )
        return Completion(token_ids, logprobs)

    async def metrics(self) -> str:
        status, answer = await self._send("GET", "/metrics", None, CONTROL_SECONDS)
        if status != HTTPStatus.OK:
            raise EngineUnavailable(f"The engine answered {status} to /metrics.")
        return answer

    def _served_name(self, policy: str) -> str:
        """What the engine calls a policy."""
        return policy

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        seconds: float = CONTROL_SECONDS,
        wanted: Any = Any,
    ) -> Any:
        """The answer, as the type that is wanted. Raises EngineUnavailable where it is none: another release's, or a proxy's."""
        status, answer = await self._send(method, path, body, seconds)
        if status != HTTPStatus.OK:
            raise EngineUnavailable(f"The engine answered {status} to {path}: {_message_of(answer)}")
        try:
            return msgspec.json.decode(answer, type=wanted)
        except msgspec.DecodeError as error:
            raise EngineUnavailable(
                f"The engine's answer to {path} is not what vLLM answers: {error}"
            ) from error

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None, seconds: float
    ) -> tuple[int, str]:
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                return response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise gone(error) from error


def _end(content: aiohttp.StreamReader, error: Exception) -> None:
    """Whoever reads on meets the error, but where all has come already."""
    if not content.is_eof():
        content.set_exception(error)


def _body(model: str, messages: Sequence[Message], sampling: Sampling, count: int) -> dict[str, Any]:
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
    return body


def _streamed(chunk_tokens: int) -> dict[str, Any]:
    """The part of a body that asks for a stream, of which each chunk says how many tokens its reply has so far."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    return {"stream": True, "stream_options": options, "stream_interval": chunk_tokens}


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
