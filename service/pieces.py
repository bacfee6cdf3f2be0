"""What an engine's answer adds to its replies, piece by piece: reads vLLM's streams and whole answers. Used by `engine.py`."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

import aiohttp
import msgspec

from service.errors import EngineGone, EngineUnavailable, EngineUnreachable, RatchetError

FINISHED = ("stop", "length")
DONE = b"[DONE]"
MOST_AT_ONCE = 64
"""Chunks that are handed on together where many have come."""


class Piece(msgspec.Struct, gc=False):
    """What has come at once of one of an engine's replies."""

    reply: int
    """Which of the engine's replies, from 0."""
    text: str
    finish_reason: str | None
    prompt_tokens: int
    """0 where the engine has not said yet."""
    completion_tokens: int
    """Of that reply so far; at least, until it has ended."""
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


async def pieces(
    content: aiohttp.StreamReader, rest: Callable[[], Awaitable[None]]
) -> AsyncIterator[list[Piece]]:
    """The chunks of one SSE stream: the first token as it comes, and then what has come after each rest.

    Raises EngineUnavailable for an error, an abort, an early end.
    """
    partial = b""
    stream = _Stream()
    most = 1  # the first token goes on at once, however much has come with it
    while received := await _received(content):
        *events, partial = (partial + received).split(b"\n\n")
        while events:
            found = stream.read(events[:most])
            if found:
                yield found
            if stream.whole:
                with suppress(RatchetError):  # the reply is whole, whatever comes now
                    await _received(content)  # the end of the body: the connection can serve the next request
                return
            del events[:most]
            if most == 1 and any(piece.text for piece in found):
                most = MOST_AT_ONCE
        if most > 1 and not stream.ends:
            await rest()
    raise EngineGone("The engine went away while it was answering. Try again.")


class _Stream:
    """How far one SSE stream has been read.

    Tokens are counted in each chunk or, where one reply is streamed, after its end: its last piece waits for that.
    """

    def __init__(self) -> None:
        self.whole = False
        """Whether it has come to its end."""
        self.ends = False
        """Whether a reply has ended uncounted: the rest comes at once."""
        self._last: dict[int, Piece] = {}
        """Of each reply that has ended uncounted."""
        self._chunks: dict[int, int] = {}

    def read(self, events: Sequence[bytes]) -> list[Piece]:
        """What server-sent events say."""
        said: list[bytes] = []
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if data == DONE:
                self.whole = True
                break
            if data and not data.startswith(b":"):
                said.append(data)
        found: list[Piece] = []
        for answer in _read(said):
            for piece in self._pieces(answer):
                _append(found, piece)
        return found + list(self._last.values()) if self.whole else found

    def _pieces(self, answer: _Answer) -> list[Piece]:
        if answer.usage is not None:
            if len(self._last) == 1 and not answer.choices:
                _, last = self._last.popitem()
                return [_counted(last, answer.usage)]
            return [_piece(answer, choice, answer.usage) for choice in answer.choices]
        found = []
        for choice in answer.choices:
            so_far = self._chunks.get(choice.index, 0) + bool(choice.delta.content)
            self._chunks[choice.index] = so_far
            piece = _piece(answer, choice, _Usage(0, so_far))
            if piece.finish_reason is None:
                found.append(piece)
            else:
                self._last[choice.index] = piece
                self.ends = True
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
    return [_piece(answer, choice, answer.usage or NO_USAGE) for choice in answer.choices]


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


def _piece(answer: _Answer, choice: _Choice, usage: _Usage) -> Piece:
    reason = choice.finish_reason
    if reason is not None and reason not in FINISHED:
        raise EngineUnavailable("The engine stopped before the answer was whole. Try again.")
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


def _counted(piece: Piece, usage: _Usage) -> Piece:
    piece.prompt_tokens, piece.completion_tokens = usage.prompt_tokens, usage.completion_tokens or 0
    return piece
