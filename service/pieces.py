"""What an engine's answer adds to its replies, piece by piece: reads vLLM's streams and whole answers. Used by `engine.py`."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

import aiohttp
import msgspec

from service.errors import EngineGone, EngineUnavailable, EngineUnreachable, RatchetError
from service.pace import Pace

FINISHED = ("stop", "length")
DONE = b"[DONE]"


class Piece(msgspec.Struct, gc=False):
    """What has come at once of one of an engine's replies."""

    reply: int
    """Which of the engine's replies, from 0."""
    text: str
    finish_reason: str | None
    prompt_tokens: int
    """0 where the engine has not said yet."""
    completion_tokens: int
    """Of that reply so far."""
    model: str
    logprobs: bytes | None = None
    """OpenAI's `logprobs` object of this piece, as JSON."""


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


_decode = msgspec.json.Decoder(list[_Answer]).decode


async def pieces(content: aiohttp.StreamReader, count: int, pace: Pace) -> AsyncIterator[list[Piece]]:
    """The chunks of one SSE stream of `count` replies; those together that came together.

    Notes in `pace` how fast it was. Raises EngineUnavailable for an error, an abort, an early end.
    """
    partial = b""
    running = count
    began: float | None = None
    while received := await _received(content):
        *events, partial = (partial + received).split(b"\n\n")
        found = _found(events)
        if began is None and any(piece.text for piece in found):
            began = time.monotonic()
        running -= sum(piece.finish_reason is not None for piece in found)
        if not running and began is not None:
            pace.note(found[-1].completion_tokens, time.monotonic() - began)
        if found:
            yield found
        if not running:
            await _read_to_end(content)
            return
    raise EngineGone("The engine went away while it was answering. Try again.")


async def _read_to_end(content: aiohttp.StreamReader) -> None:
    """So that the connection can serve the next request. The replies are whole, whatever comes now."""
    with suppress(RatchetError):
        while await _received(content):
            pass


def _found(events: Sequence[bytes]) -> list[Piece]:
    """What server-sent events say."""
    said = (event.removeprefix(b"data:").strip() for event in events)
    found: list[Piece] = []
    for answer in _read([data for data in said if data and data != DONE and not data.startswith(b":")]):
        for choice in answer.choices:
            _append(found, _piece(answer, choice))
    return found


def _append(found: list[Piece], piece: Piece) -> None:
    """Add what came. Text of one reply that runs on is one piece: who reads it at once has no use for how it was cut."""
    before = found[-1] if found else None
    if before is None or before.reply != piece.reply or _stands_alone(before) or _stands_alone(piece):
        found.append(piece)
    else:
        before.text += piece.text
        before.completion_tokens = piece.completion_tokens


def _stands_alone(piece: Piece) -> bool:
    return piece.finish_reason is not None or piece.logprobs is not None


async def only(found: list[Piece]) -> AsyncIterator[list[Piece]]:
    """An answer that came at once."""
    yield found


async def read_whole(response: aiohttp.ClientResponse) -> list[Piece]:
    """The pieces of an answer that is not streamed. Raises EngineUnavailable."""
    try:
        data = await response.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise gone(error) from error
    [answer] = _read([data])
    return [_piece(answer, choice) for choice in answer.choices]


def gone(error: Exception) -> EngineGone:
    """What a failure to reach an engine is called."""
    unreachable = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    kind = EngineUnreachable if unreachable else EngineGone
    return kind(f"The engine did not answer ({type(error).__name__}). Try again.")


async def _received(content: aiohttp.StreamReader) -> bytes:
    """What has come since, at least one byte; nothing at the end."""
    try:
        return await content.readany()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise gone(error) from error


def _read(data: Sequence[bytes]) -> list[_Answer]:
    """Several at once: what decoding costs is mostly its beginning."""
    try:
        answers = _decode(b"[%b]" % b",".join(data))
    except msgspec.DecodeError:
        raise EngineUnavailable("The engine gave an answer that cannot be read. Try again.") from None
    if any(answer.error is not None for answer in answers):
        raise EngineUnavailable("The engine failed while it was answering. Try again.")
    return answers


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
