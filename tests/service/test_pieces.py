"""How an engine's streams are read."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from service.beat import Beat
from service.engine import MANY, Sampling, VllmEngine
from service.errors import EngineGone, EngineUnavailable
from service.pieces import Piece, pieces
from service.policies import BASE
from tests.service.http_engine import LOOK_SECONDS, HttpEngine, running_http_engine

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


async def read(content: Content) -> tuple[list[list[Piece]], int]:
    """The pieces that came together, and the number of rests."""
    rests = 0

    async def rest() -> None:
        nonlocal rests
        rests += 1

    return [found async for found in pieces(content, rest)], rests  # type: ignore[arg-type]


async def test_a_reply_that_is_counted_after_its_end_ends_with_its_counts() -> None:
    content = Content(chunk(""), chunk("one "), chunk("two"), chunk("", "stop"), counts(7, 3), DONE)
    found, _ = await read(content)
    assert [(p.text, p.finish_reason) for each in found for p in each] == [
        ("", None),
        ("one ", None),
        ("two", None),
        ("", "stop"),
    ]
    assert (found[-1][0].prompt_tokens, found[-1][0].completion_tokens) == (7, 3)
    assert [each[0].completion_tokens for each in found[:-1]] == [0, 1, 2], (
        "what is known if it is cut off here"
    )


async def test_replies_that_are_never_counted_end_all_the_same() -> None:
    found, _ = await read(Content(chunk("one"), chunk(" two", "length") + chunk("a", "stop", reply=1) + DONE))
    assert found[-1] == [Piece(0, " two", "length", 0, 2, "m"), Piece(1, "a", "stop", 0, 1, "m")]


async def test_of_several_replies_each_ends_at_its_own_time() -> None:
    content = Content(
        chunk("a", usage=(7, 1)),
        chunk("b", "stop", (7, 2), reply=1),
        chunk("c", "stop", (7, 2)),
        counts(7, 4),
        DONE,
    )
    found, _ = await read(content)
    assert [(p.reply, p.finish_reason, p.completion_tokens) for each in found for p in each] == [
        (0, None, 1),
        (1, "stop", 2),
        (0, "stop", 2),
    ]


async def test_the_first_token_goes_on_by_itself_and_what_has_come_with_it_follows() -> None:
    content = Content(
        chunk(""), chunk("a") + chunk("b") + chunk("c"), chunk("d") + chunk("e"), chunk("", "stop") + DONE
    )
    found, _ = await read(content)
    assert [[p.text for p in each] for each in found] == [[""], ["a"], ["bc"], ["de"], [""]]


async def test_a_stream_rests_between_reads_from_its_first_token_to_its_end() -> None:
    found, rests = await read(
        Content(chunk(""), chunk("a"), chunk("b"), chunk("", "stop"), counts(7, 2), DONE)
    )
    assert [p.text for each in found for p in each] == ["", "a", "b", ""]
    assert rests == 2, "after each of the tokens, not before the first, nor after the end"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (Content(chunk("a")), EngineGone),
        (Content(chunk("a"), chunk("b", "stop")), EngineGone),
        (Content(chunk("a"), chunk("", "abort"), DONE), EngineUnavailable),
        (Content(chunk("a"), event({"error": {"message": "out of memory"}})), EngineUnavailable),
        (Content(b"data: {\n\n"), EngineUnavailable),
    ],
    ids=["early end", "early end, uncounted", "aborted", "error", "unreadable"],
)
async def test_a_stream_that_is_not_whole_is_an_error(content: Content, error: type[Exception]) -> None:
    with pytest.raises(error):
        await read(content)


async def test_all_who_wait_for_a_beat_go_on_at_the_same_one_and_one_who_leaves_keeps_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strikes: list[Callable[[], None]] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda seconds, strike: strikes.append(strike))
    beat = Beat(0.05)
    first, leaves, last = (beat.next() for _ in range(3))
    leaves.cancel()
    assert len(strikes) == 1, "one timer for all"
    assert not first.done()
    strikes[0]()
    assert first.done()
    assert last.done()
    after = beat.next()
    assert len(strikes) == 2, "who comes later waits for the next one"
    strikes[1]()
    assert after.done()


LONG = 1000.0
"""Seconds between beats, in which none comes."""


@asynccontextmanager
async def one_of(num_requests: int) -> AsyncIterator[tuple[HttpEngine, AsyncIterator[list[Piece]]]]:
    """One of so many streams of one engine; its last word is held back."""
    deadline = asyncio.get_running_loop().time() + 60
    with running_http_engine() as served:
        served.hold("word")
        async with aiohttp.ClientSession() as session, AsyncExitStack() as stack:
            engine = VllmEngine(served.url, session)
            streams = [
                await stack.enter_async_context(
                    engine.generate(BASE, [], SAMPLING, 1, stream=True, deadline=deadline)
                )
                for _ in range(num_requests)
            ]
            yield served, streams[0]


async def test_where_few_are_answered_the_end_of_a_reply_does_not_wait_for_a_beat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.engine.BEAT_SECONDS", LONG)
    async with one_of(MANY - 1) as (served, stream):
        found = []
        async for each in stream:
            found += each
            served.release()
    assert "".join(piece.text for piece in found) == "one two"
    assert found[-1].finish_reason == "stop"


async def test_where_many_are_answered_nothing_is_received_before_the_beat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.engine.BEAT_SECONDS", LONG)
    beats: list[Beat] = []
    start = Beat.__init__
    monkeypatch.setattr(Beat, "__init__", lambda beat, seconds: (start(beat, seconds), beats.append(beat))[0])
    async with one_of(MANY) as (served, stream):
        assert [piece.text for piece in await anext(stream)] == ["one "]
        served.release()
        rest = asyncio.create_task(collect(stream))
        await asyncio.sleep(10 * LOOK_SECONDS)  # in which the end comes to the socket
        assert not rest.done()
        beats[0]._strike()
        assert "".join(piece.text for piece in await rest) == "two"


async def collect(stream: AsyncIterator[list[Piece]]) -> list[Piece]:
    return [piece async for each in stream for piece in each]
