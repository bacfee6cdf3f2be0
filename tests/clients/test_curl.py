"""curl, as the README uses it."""

import json
import subprocess
from typing import Any

import httpx
import pytest

from tests.clients.conftest import ASKED, CHAT, Fault
from tests.clients.lockstep import LockstepEngine
from tests.engine import free_port
from tests.service.conftest import Serve, ask, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.database]
ALL_WELL, REFUSED_TO_CONNECT, STATUS_IS_AN_ERROR = 0, 7, 22


def words(service: httpx.Client, *more: str, key: str = "none", **fields: Any) -> list[str]:
    """A command line."""
    url = str(service.base_url).rstrip("/") + CHAT
    head = ["-H", "content-type: application/json", "-H", f"authorization: Bearer {key}"]
    return ["curl", "-sS", "--max-time", "60", *more, url, *head, "-d", json.dumps(ask(**fields))]


def run(*line: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(line, capture_output=True, text=True)


def test_it_shows_the_answer_as_it_is(service: httpx.Client, told: dict[str, Any]) -> None:
    ended = run(*words(service, **ASKED))
    assert ended.returncode == ALL_WELL
    answer = json.loads(ended.stdout)
    assert answer["choices"][0]["message"] == told["choices"][0]["message"]
    assert (answer["usage"], answer["choices"][0]["finish_reason"]) == (told["usage"], "length")


def test_it_streams_the_same_answer(service: httpx.Client, told: dict[str, Any]) -> None:
    ended = run(*words(service, "-N", **ASKED, stream=True, stream_options={"include_usage": True}))
    assert ended.returncode == ALL_WELL
    *events, done = (line.removeprefix("data: ") for line in ended.stdout.splitlines() if line)
    assert done == "[DONE]"
    *body, last = map(json.loads, events)
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in body)
    assert text == told["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in body] == [None] * (len(body) - 1) + ["length"]
    assert (last["choices"], last["usage"]) == ([], told["usage"])


def test_each_piece_is_shown_before_the_next_is_made_and_going_away_ends_the_rest(serve: Serve) -> None:
    engine = LockstepEngine()
    line = words(serve(engine), "-N", text="hi", stream=True)
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        for word in ("one ", "two "):
            engine.let.release()
            if word == "one ":
                assert '"role":"assistant"' in curl.stdout.readline()
                assert curl.stdout.readline() == "\n"
            assert json.loads(curl.stdout.readline()[6:])["choices"][0]["delta"]["content"] == word
            assert curl.stdout.readline() == "\n"
        curl.terminate()
    wait_until(lambda: engine.aborted == 1)


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("unknown model", 404, "model_not_found"),
        ("bad temperature", 400, None),
        ("too long", 400, "context_length_exceeded"),
        ("wrong key", 401, "invalid_api_key"),
        ("key needed", 401, "invalid_api_key"),
        ("too many calls", 429, "rate_limit_exceeded"),
        ("engine gone", 503, "engine_not_ready"),
    ],
)
def test_a_refusal_has_its_status_and_says_why(
    fault: Fault, name: str, status: int, code: str | None
) -> None:
    service, change = fault(name)
    asked = {"text": "hi", "max_tokens": 4, "key": change.pop("api_key", "none")} | change
    for streamed in (False, True):
        ended = run(*words(service, "-N", "-w", "%{stderr}%{http_code}", **asked, stream=streamed))
        assert (ended.returncode, ended.stderr) == (ALL_WELL, str(status))
        error = json.loads(ended.stdout)["error"]
        assert error["code"] == code
        assert error["message"]
    assert run(*words(service, "--fail-with-body", **asked)).returncode == STATUS_IS_AN_ERROR


def test_an_engine_that_breaks_midway_is_the_last_event(fault: Fault) -> None:
    service, _ = fault("breaks midway")
    ended = run(*words(service, "-N", text="hi", stream=True))
    assert ended.returncode == ALL_WELL  # the stream is whole: its last event tells
    assert "[DONE]" not in ended.stdout
    last = ended.stdout.split("\n\n")[-2].removeprefix("data: ")
    assert "engine went away" in json.loads(last)["error"]["message"]


def test_where_nobody_listens_its_exit_status_says_so() -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{free_port()}") as nobody:
        assert run(*words(nobody, text="hi")).returncode == REFUSED_TO_CONNECT
