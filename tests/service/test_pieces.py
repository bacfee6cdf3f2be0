"""How an engine's streams are read."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from service.beat import Beat
from service.engine import Sampling, VllmEngine
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
    looks = timers(monkeypatch)
    beat = Beat(0.06, looks=2)
    first, leaves, last = (asyncio.ensure_future(beat.wait(lambda: False)) for _ in range(3))
    await asyncio.sleep(0)
    leaves.cancel()
    for _ in range(2):
        assert len(looks) == 1, "one timer for all"
        assert not first.done()
        looks.pop()()
        await asyncio.sleep(0)
    assert first.done()
    assert last.done()
    assert not looks, "no timer where nobody waits"
    after = asyncio.ensure_future(beat.wait(lambda: False))
    await asyncio.sleep(0)
    looks.pop()()
    await asyncio.sleep(0)
    assert not after.done(), "who comes later waits for the next one"


async def test_whose_wait_is_over_goes_on_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = timers(monkeypatch)
    beat = Beat(0.06, looks=3)
    over: list[str] = []
    ends, runs = (asyncio.ensure_future(beat.wait(lambda name=name: name in over)) for name in "ab")  # type: ignore[misc]
    await asyncio.sleep(0)
    over.append("a")
    looks.pop()()
    await asyncio.sleep(0)
    assert ends.done()
    assert not runs.done()
    runs.cancel()


def timers(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What the loop was asked to call later, which it never does."""
    found: list[Callable[[], None]] = []
    monkeypatch.setattr(
        asyncio.get_running_loop(), "call_later", lambda seconds, callback: found.append(callback)
    )
    return found


@pytest.fixture
def no_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    """No beat comes within a test, but looks do."""
    monkeypatch.setattr("service.engine.BEAT_SECONDS", 1000.0)
    monkeypatch.setattr("service.engine.LOOKS", round(1000.0 / LOOK_SECONDS))


@asynccontextmanager
async def one_stream() -> AsyncIterator[tuple[HttpEngine, AsyncIterator[list[Piece]]]]:
    """Its last word is held back, and its end."""
    deadline = asyncio.get_running_loop().time() + 60
    with running_http_engine() as served:
        served.hold("word", "end")
        async with aiohttp.ClientSession() as session:
            engine = VllmEngine(served.url, session)
            async with engine.generate(BASE, [], SAMPLING, 1, stream=True, deadline=deadline) as stream:
                yield served, stream


@pytest.mark.usefixtures("no_beat")
async def test_text_waits_for_the_beat_and_the_end_of_a_reply_does_not() -> None:
    async with one_stream() as (served, stream):
        found = await anext(stream)
        rest = asyncio.create_task(collect(stream, found))
        served.release("word")
        served.wait_until_reached("end")
        await asyncio.sleep(10 * LOOK_SECONDS)
        assert [piece.text for piece in found] == ["one "]
        served.release()
        async with asyncio.timeout(10):
            await rest
    assert [(piece.text, piece.finish_reason) for piece in found] == [
        ("one ", None),
        ("two", None),
        ("", "stop"),
    ]


@pytest.mark.usefixtures("no_beat")
async def test_an_engine_that_goes_away_is_noticed_before_the_beat() -> None:
    async with one_stream() as (served, stream):
        await anext(stream)
        rest = asyncio.create_task(collect(stream, []))
        await asyncio.sleep(LOOK_SECONDS)
        served.abort()
        async with asyncio.timeout(10):
            with pytest.raises(EngineGone):
                await rest


async def collect(stream: AsyncIterator[list[Piece]], found: list[Piece]) -> None:
    async for each in stream:
        found += each
