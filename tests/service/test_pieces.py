"""How an engine's streams are read."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from service.engine import Sampling, VllmEngine
from service.errors import EngineGone, EngineUnavailable
from service.pace import MOST_TOKENS, Pace
from service.pieces import Piece, pieces
from service.policies import BASE
from tests.service.http_engine import running_http_engine

SAMPLING = Sampling(8, 1.0, 1.0, 0.0, (), None, 0.0, 0.0)

DONE = b"data: [DONE]\n\n"


class Content:
    """Of a response: gives what has come, read by read."""

    def __init__(self, *reads: bytes) -> None:
        self.reads = list(reads)

    async def readany(self) -> bytes:
        return self.reads.pop(0) if self.reads else b""


def chunk(
    text: str, finish_reason: str | None = None, usage: tuple[int, int] | None = None, reply: int = 0
) -> bytes:
    choice = {"index": reply, "delta": {"content": text}, "finish_reason": finish_reason}
    return event({"model": "m", "choices": [choice]} | counted(usage))


def counts(prompt: int, completion: int) -> bytes:
    return event({"model": "m", "choices": []} | counted((prompt, completion)))


def counted(usage: tuple[int, int] | None) -> dict[str, Any]:
    return {"usage": dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))} if usage else {}


def event(answer: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(answer).encode() + b"\n\n"


async def read(content: Content, count: int = 1) -> list[list[Piece]]:
    """The pieces of so many replies that came together."""
    return [found async for found in pieces(content, count, Pace())]  # type: ignore[arg-type]


async def test_a_reply_is_counted_as_it_comes_and_ends_with_its_last_chunk() -> None:
    content = Content(
        chunk("", usage=(7, 0)),
        chunk("one ", usage=(7, 1)),
        chunk("two three", usage=(7, 3)),
        chunk("", "stop", (7, 4)),
        counts(7, 4),
        DONE,
    )
    found = await read(content)
    assert found == [
        [Piece(0, "", None, 7, 0, "m")],
        [Piece(0, "one ", None, 7, 1, "m")],
        [Piece(0, "two three", None, 7, 3, "m")],
        [Piece(0, "", "stop", 7, 4, "m")],
    ]
    assert not content.reads, "the connection can serve the next request"


async def test_replies_that_are_never_counted_end_all_the_same() -> None:
    content = Content(chunk("one"), chunk(" two", "length") + chunk("a", "stop", reply=1) + DONE)
    found = await read(content, 2)
    assert found[-1] == [Piece(0, " two", "length", 0, 0, "m"), Piece(1, "a", "stop", 0, 0, "m")]


async def test_what_befalls_a_stream_whose_replies_have_ended_is_nothing_to_them() -> None:
    found = await read(Content(chunk("one", "stop", (7, 1))))
    assert found == [[Piece(0, "one", "stop", 7, 1, "m")]]


async def test_of_several_replies_each_ends_at_its_own_time() -> None:
    content = Content(
        chunk("a", usage=(7, 1)),
        chunk("b", "stop", (7, 2), reply=1),
        chunk("c", "stop", (7, 2)),
        counts(7, 4),
        DONE,
    )
    found = await read(content, 2)
    assert [(p.reply, p.finish_reason, p.completion_tokens) for each in found for p in each] == [
        (0, None, 1),
        (1, "stop", 2),
        (0, "stop", 2),
    ]


async def test_what_has_come_together_goes_on_together() -> None:
    found = await read(
        Content(
            chunk("") + chunk("a"),
            chunk("b") + chunk("c") + chunk("d")[:9],
            chunk("d")[9:],
            chunk("", "stop"),
        )
    )
    assert [[p.text for p in each] for each in found] == [["a"], ["bc"], ["d"], [""]]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (Content(chunk("a")), EngineGone),
        (Content(chunk("a"), DONE), EngineGone),
        (Content(chunk("a"), chunk("", "abort"), DONE), EngineUnavailable),
        (Content(chunk("a"), event({"error": {"message": "out of memory"}})), EngineUnavailable),
        (Content(b"data: {\n\n"), EngineUnavailable),
    ],
    ids=["early end", "no end", "aborted", "error", "unreadable"],
)
async def test_a_stream_that_is_not_whole_is_an_error(content: Content, error: type[Exception]) -> None:
    with pytest.raises(error):
        await read(content)


async def test_one_of_two_replies_that_does_not_end_is_an_error() -> None:
    with pytest.raises(EngineGone):
        await read(Content(chunk("a", "stop") + chunk("b", reply=1)), 2)


async def test_a_stream_is_asked_for_in_chunks_as_large_as_the_last_ones_were_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "service.pieces.time", SimpleNamespace(monotonic=lambda: 100.0)
    )  # on a busy machine too
    deadline = asyncio.get_running_loop().time() + 60
    with running_http_engine() as served:
        async with aiohttp.ClientSession() as session:
            engine = VllmEngine(served.url, session)
            for stream in (True, True, False):
                async with engine.generate(BASE, [], SAMPLING, 1, stream=stream, deadline=deadline) as found:
                    await collect(found)
    assert [body.get("stream_interval") for body in served.chats] == [1, MOST_TOKENS, None]


async def collect(stream: AsyncIterator[list[Piece]]) -> list[Piece]:
    return [piece async for each in stream for piece in each]
