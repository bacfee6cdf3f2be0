"""Streams that end early: the service stops, or the client does not read."""

import asyncio
import json
import socket

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Message

from service import streaming
from service.settings import Settings
from tests.service.conftest import Rows, Serve, address_of, ask, running, wait_until
from tests.service.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"


@pytest.mark.database
def test_a_service_that_is_asked_to_stop_lets_running_replies_end(prepared: Settings, rows: Rows) -> None:
    engine = FakeEngine(replies=("one two three four five",), pause_seconds=0.3)
    with (
        running(prepared, lambda _: lambda _: engine) as server,
        httpx.Client(base_url=address_of(server), timeout=60) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        with client.stream("POST", CHAT, json=ask(stream=True)) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.should_exit = True
            rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert rows("SELECT content, finish_reason FROM replies") == [("one two three four five", "stop")]


@pytest.mark.database
def test_a_client_that_does_not_read_is_cut_off(
    serve: Serve, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SLOW_SECONDS", 0.2)
    engine = FakeEngine(replies=(" ".join(["x" * 100_000] * 200),))
    client = serve(engine, request_deadline_seconds=3.0)
    body = json.dumps(ask(stream=True)).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as lazy:
        lazy.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        wait_until(lambda: engine.aborted == 1)
        wait_until(lambda: rows("SELECT finish_reason FROM replies") != [(None,)])
    [(reason,)] = rows("SELECT finish_reason FROM replies")
    assert reason in ("abort", "error")
    engine.replies = ("fine",)
    assert client.post(CHAT, json=ask(max_tokens=1)).status_code == 200


class Client:
    """What a server receives of one that has sent its request."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_work_whose_client_goes_is_cancelled_and_whoever_asked_for_it_goes_on() -> None:
    client = Client()
    asked = asyncio.create_task(streaming.until_gone(client.receive, never()))
    await asyncio.sleep(0)
    client.gone.set()
    assert (await asked).status_code == streaming.CLIENT_CLOSED
    assert not asked.cancelling()


async def test_a_client_that_goes_once_the_work_is_done_disturbs_nobody() -> None:
    client = Client()

    async def work() -> Response:
        client.gone.set()
        return Response("done")

    assert (await streaming.until_gone(client.receive, work())).body == b"done"
    for _ in range(5):
        await asyncio.sleep(0)  # is not cancelled


@pytest.mark.parametrize("client_goes_too", [False, True])
async def test_whoever_is_cancelled_while_the_work_runs_is_told(client_goes_too: bool) -> None:
    client = Client()
    asked = asyncio.create_task(streaming.until_gone(client.receive, never()))
    await asyncio.sleep(0)
    if client_goes_too:
        client.gone.set()
        for _ in range(2):
            await asyncio.sleep(0)
        assert asked.cancelling()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked


async def never() -> Response:
    await asyncio.Event().wait()
    raise AssertionError
