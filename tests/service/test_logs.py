"""What is logged: request and policy ids, in JSON a line for each request, and never a message."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import logs
from service.settings import Settings
from tests.engine import free_port
from tests.service.conftest import Rows, ask, wait_until

CHAT = "/v1/chat/completions"
SECRET = "Zebrafink"
BREAKS = "break off"


class Engine(BaseHTTPRequestHandler):
    """As much of vLLM as a service needs. Says what it was told, and where that has `BREAKS` in it, fails midway with those words."""

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "policy-000000", "max_model_len": 512}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "messages" not in body:
            self.answer({"choices": [{"text": "a"}]})
            return
        said = body["messages"][-1]["content"]
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"content": said}, "finish_reason": "stop"}
            self.answer({"model": body["model"], "choices": [choice], "usage": usage})
            return
        self.send_response(200)
        self.end_headers()
        for index in range(body["n"]):
            self.send_event(body["model"], {"index": index, "delta": {"content": f"{index} {said}"}})
            if BREAKS in said:
                self.wfile.write(b'data: {"error": {"message": "%s"}}\n\n' % said.encode())
                return
            self.send_event(body["model"], {"index": index, "delta": {}, "finish_reason": "stop"})
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, model: str, choice: dict[str, Any]) -> None:
        self.wfile.write(b"data: %s\n\n" % json.dumps({"model": model, "choices": [choice]}).encode())

    def answer(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def engine() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def process(settings: Settings, log: Path, log_format: str) -> Iterator[httpx.Client]:
    """A service as `python -m service` starts it; all that it writes goes to `log`."""
    assert settings.database_url is not None
    port = free_port()
    with engine() as url, log.open("wb") as output:
        environment = os.environ | {
            "DATABASE_URL": settings.database_url.get_secret_value(),
            "RATCHET_ENGINE_URLS": json.dumps([url]),
            "RATCHET_PORT": str(port),
            "RATCHET_LOG_FORMAT": log_format,
        }
        service = subprocess.Popen(
            [sys.executable, "-m", "service"], env=environment, stdout=output, stderr=output
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                wait_until(lambda: _is_ready(client))
                yield client
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(120)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def talk(client: httpx.Client, rows: Rows) -> dict[str, httpx.Response]:
    """Says the secret in every way that comes to mind, well and with faults."""
    answers = {
        "whole": client.post(CHAT, json=ask(SECRET, user="ada")),
        "stream": client.post(CHAT, json=ask(SECRET, stream=True, user="ada")),
        "compared": client.post(CHAT, json=ask(SECRET, comparison="always", user="ada")),
        "broken": client.post(CHAT, json=ask(f"{SECRET} {BREAKS}", stream=True)),
        "wrong": client.post(CHAT, json=ask(SECRET, temperature=SECRET)),
        "no JSON": client.post(CHAT, content=f'{{"messages": "{SECRET}'),
        "no path": client.get(f"/v1/{SECRET}"),
        "no model": client.post(CHAT, json=ask(model=SECRET)),
    }
    vote = f"/v1/comparisons/{answers['compared'].json()['comparison']['id']}/vote"
    body = {"choice": "first", "comment": SECRET, "user": "ada"}
    answers["vote"] = client.put(vote, json=body)
    rows("ALTER TABLE votes RENAME COLUMN comment TO gone")
    answers["fault"] = client.put(vote, json=body | {"comment": f"{SECRET} again"})
    rows("ALTER TABLE votes RENAME COLUMN gone TO comment")
    rows("ALTER TABLE prompts ADD CONSTRAINT short CHECK (length(messages::text) < 20) NOT VALID")
    answers["refused by the database"] = client.post(CHAT, json=ask(SECRET))
    return answers


@pytest.mark.database
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_message_is_logged_whatever_happens(
    prepared: Settings, rows: Rows, tmp_path: Path, log_format: str
) -> None:
    with process(prepared, tmp_path / "log", log_format) as client:
        answers = talk(client, rows)
    assert {name: answer.status_code for name, answer in answers.items()} == {
        "whole": 200,
        "stream": 200,
        "compared": 200,
        "broken": 200,
        "wrong": 400,
        "no JSON": 400,
        "no path": 404,
        "no model": 404,
        "vote": 200,
        "fault": 500,
        "refused by the database": 500,
    }
    log = (tmp_path / "log").read_text()
    assert SECRET.lower() not in log.lower()
    assert "ProgrammingError" in log  # the fault is told, by its kind
    assert "feedback.py" in log  # and its place


@pytest.mark.database
def test_json_has_a_line_for_each_request_with_its_id_route_status_and_policy(
    prepared: Settings, rows: Rows, tmp_path: Path
) -> None:
    with process(prepared, tmp_path / "log", "json") as client:
        answers = talk(client, rows)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    told = {line["request"]: line for line in lines if line["message"] == "answered"}
    for answer in answers.values():
        line = told[answer.headers["x-request-id"]]
        assert line["status"] == answer.status_code
        assert line["seconds"] >= 0
    whole = told[answers["whole"].headers["x-request-id"]]
    assert (whole["method"], whole["route"], whole["policies"]) == ("POST", CHAT, ["policy-000000"])
    assert told[answers["no path"].headers["x-request-id"]]["route"] == "none"
    broken = answers["broken"].headers["x-request-id"]
    [warning] = [line for line in lines if line.get("request") == broken and line["level"] == "warning"]
    assert warning["policies"] == ["policy-000000"]


def logged(formatter: logging.Formatter) -> str:
    """What a fault that quotes its input is logged as."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(formatter)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        int(SECRET)
    except ValueError:
        logger.exception("it went wrong")
    return output.getvalue()


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
def test_a_fault_is_told_by_place_and_kind_and_not_in_its_own_words(formatter: logging.Formatter) -> None:
    text = logged(formatter)
    assert "it went wrong" in text
    assert "ValueError" in text
    assert "test_logs.py" in text
    assert SECRET not in text


def test_a_consoles_lines_become_lines_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    writer = logs.LineWriter("ratchet.trainer")
    writer.write("cycle 1: snap")
    writer.write("shot\n\ncycle 1: gate\nhalf")
    assert [record.getMessage() for record in caplog.records] == ["cycle 1: snapshot", "cycle 1: gate"]
