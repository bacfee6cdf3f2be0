"""Streams that end early: the service stops, or the client does not read."""

import json
import socket

import httpx
import pytest

from service import streaming
from service.settings import Settings
from tests.service.conftest import Rows, Serve, address_of, ask, running, wait_until
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
CHAT = "/v1/chat/completions"


def test_a_service_that_is_asked_to_stop_lets_running_replies_end(prepared: Settings, rows: Rows) -> None:
    engine = FakeEngine(replies=("one two three four five",), pause_seconds=0.3)
    with (
        running(prepared, lambda _: lambda _: engine) as server,
        httpx.Client(base_url=address_of(server)) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        with client.stream("POST", CHAT, json=ask(stream=True)) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.should_exit = True
            rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert rows("SELECT content, finish_reason FROM replies") == [("one two three four five", "stop")]


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
