"""Several replicas: what becomes of requests when one of them fails, hangs or comes back; by scripted engines."""

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service import fleet, reconciler, replicas
from service.errors import EngineGone, EngineUnavailable
from tests.service.conftest import Rows, Serve, ask, chunks, command_line, publish, wait_until
from tests.service.fake_engine import FakeEngine
from tests.service.test_reconciler import make_folder

pytestmark = pytest.mark.database
CHAT = "/v1/chat/completions"
REPLICAS = "/operator/replicas"
BASE, NEW = "policy-000000", "policy-000001"
POINTER = "SELECT live, previous, challenger FROM deployment"


@pytest.fixture
def two() -> tuple[FakeEngine, FakeEngine]:
    """Of equally busy replicas the first is asked."""
    return FakeEngine(url="a", replies=("from a",)), FakeEngine(url="b", replies=("from b",))


def states(client: httpx.Client) -> dict[str, tuple[str, bool]]:
    return {row["url"]: (row["state"], row["healthy"]) for row in client.get(REPLICAS).json()}


def healthy(client: httpx.Client, url: str) -> bool:
    return states(client)[url][1]


def serve_both(serve: Serve, *engines: FakeEngine, **settings: Any) -> httpx.Client:
    client = serve(*engines, **settings)
    wait_until(lambda: all(healthy(client, engine.url) for engine in engines))
    return client


def text_of(answer: httpx.Response) -> str:
    """What a stream said, in all."""
    found = [chunk["choices"][0]["delta"]["content"] for chunk in chunks(answer) if "choices" in chunk]
    return "".join(found)


@contextmanager
def asking(client: httpx.Client, count: int, **fields: Any) -> Iterator[list[httpx.Response]]:
    """So many requests at once; their answers, when the body is left."""
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post(CHAT, json=ask(**fields))))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("error", [EngineGone("gone"), EngineUnavailable("it failed")])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_engine_fails_before_its_first_token_is_answered_by_another(
    serve: Serve, rows: Rows, two: tuple[FakeEngine, FakeEngine], stream: bool, error: EngineUnavailable
) -> None:
    client = serve_both(serve, *two)
    two[0].breaks_after, two[0].fails_with = 0, error
    answer = client.post(CHAT, json=ask(stream=stream))
    assert answer.status_code == 200
    assert (text_of(answer) if stream else answer.json()["choices"][0]["message"]["content"]) == "from b"
    assert [len(engine.asked) for engine in two] == [1, 1]
    assert rows("SELECT content, finish_reason FROM replies") == [("from b", "stop")]
    if stream:
        assert answer.text.endswith("data: [DONE]\n\n")


def test_after_its_first_token_a_stream_ends_in_an_error_event_and_asks_nobody_else(
    serve: Serve, rows: Rows, two: tuple[FakeEngine, FakeEngine]
) -> None:
    client = serve_both(serve, *two)
    two[0].breaks_after, two[0].fails_with = 1, EngineGone("The engine went away.")
    answer = client.post(CHAT, json=ask(stream=True))
    assert text_of(answer) == "from "
    assert chunks(answer)[-1]["error"]["message"] == "The engine went away."
    assert "[DONE]" not in answer.text
    assert two[1].asked == []
    assert rows("SELECT content, finish_reason FROM replies") == [("from ", "error")]


def test_a_whole_comparison_is_begun_anew_elsewhere_however_far_it_was(
    serve: Serve, rows: Rows, two: tuple[FakeEngine, FakeEngine]
) -> None:
    """Its client has seen nothing yet."""
    two[1].replies = ("from b", "also from b")
    client = serve_both(serve, *two)
    two[0].breaks_after, two[0].fails_with = 3, EngineGone("gone")
    answer = client.post(CHAT, json=ask(comparison="always"))
    assert answer.status_code == 200
    said = {choice["message"]["content"] for choice in answer.json()["choices"]}
    assert said == {"from b", "also from b"}
    assert {content for (content,) in rows("SELECT content FROM replies")} == said


def test_a_request_that_ends_two_engines_is_not_sent_to_a_third(serve: Serve, rows: Rows) -> None:
    engines = [FakeEngine(url=url) for url in "abc"]
    client = serve_both(serve, *engines)
    for engine in engines:
        engine.breaks_after, engine.fails_with = 0, EngineGone(f"{engine.url} is gone")
    answer = client.post(CHAT, json=ask())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert sorted(len(engine.asked) for engine in engines) == [0, 1, 1]
    assert rows("SELECT content, finish_reason FROM replies") == [("", "error")]


def test_in_a_duel_only_the_reply_whose_engine_failed_is_asked_for_again(
    serve: Serve, rows: Rows, two: tuple[FakeEngine, FakeEngine], tmp_path: Path
) -> None:
    for engine in two:
        engine.logprobs = {NEW: -2.0}
        engine.says = {BASE: "the old answer", NEW: "something rather different"}
    client = serve_both(serve, *two, duel_votes=100, duel_share=1.0)
    publish(rows, NEW, make_folder(tmp_path / NEW))
    wait_until(lambda: rows("SELECT count(*) FROM duels") == [(1,)])
    wait_until(lambda: _duels(client, rows))
    for engine in two:
        engine.asked.clear()
    two[0].breaks_after, two[0].fails_with = 0, EngineUnavailable("it failed")
    answer = client.post(CHAT, json=ask(comparison="always", stream=True))
    assert answer.text.endswith("data: [DONE]\n\n")
    assert len(two[0].asked) == 1
    assert sorted(policy for policy, *_ in two[1].asked) == [BASE, NEW]


def _duels(client: httpx.Client, rows: Rows) -> bool:
    client.post(CHAT, json=ask(comparison="always"))
    return rows("SELECT count(*) FROM comparisons WHERE duel_id IS NOT NULL") != [(0,)]


def test_requests_go_to_the_replica_that_is_least_busy(
    serve: Serve, two: tuple[FakeEngine, FakeEngine]
) -> None:
    client = serve_both(serve, *two)
    for engine in two:
        engine.pause_seconds = 2.0
    with asking(client, 8) as answers:
        pass
    assert [answer.status_code for answer in answers] == [200] * 8
    assert [len(engine.asked) for engine in two] == [4, 4]


def test_a_replica_that_restarted_is_asked_nothing_until_it_reproduces_its_policies(
    serve: Serve, rows: Rows, two: tuple[FakeEngine, FakeEngine], tmp_path: Path
) -> None:
    for engine in two:
        engine.logprobs = {NEW: -2.0}
    client = serve_both(serve, *two)
    publish(rows, NEW, make_folder(tmp_path / NEW))
    wait_until(lambda: rows(POINTER) == [(NEW, BASE, None)])
    wait_until(lambda: client.post(CHAT, json=ask()).headers.get("x-ratchet-policy") == NEW)
    first = two[0]
    first.alive = False
    assert client.post(CHAT, json=ask()).status_code == 200
    first.held, first.logprobs, first.alive = (
        {BASE},
        {NEW: -9.0},
        True,
    )  # back, with weights that are not the policy's
    wait_until(lambda: NEW in first.held)
    first.asked.clear()
    for _ in range(10):
        assert client.post(CHAT, json=ask()).json()["choices"][0]["message"]["content"] == "from b"
        time.sleep(0.05)
    assert [policy for policy, *_ in first.asked] == []
    assert rows(POINTER) == [
        (NEW, BASE, None)
    ]  # what is live elsewhere is not refused for one replica's sake


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "HEALTH_SECONDS", 0.2)
    monkeypatch.setattr(fleet, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(reconciler, "POLL_SECONDS", 0.2)


@pytest.mark.parametrize("stream", [True, False])
def test_requests_that_wait_at_an_engine_that_hangs_are_answered_by_another(
    serve: Serve, quick: None, two: tuple[FakeEngine, FakeEngine], stream: bool
) -> None:
    client = serve_both(serve, *two)
    two[0].hangs = True
    began = time.monotonic()
    with asking(client, 6, stream=stream) as answers:
        pass
    assert all("from" in answer.text and "error" not in answer.text for answer in answers)
    assert time.monotonic() - began < 30
    wait_until(lambda: not healthy(client, "a"))
    num_asked = len(two[0].asked)
    assert client.post(CHAT, json=ask()).status_code == 200
    assert len(two[0].asked) == num_asked
    two[0].hangs = False
    wait_until(lambda: healthy(client, "a"))


def test_a_replica_that_hangs_delays_neither_the_others_nor_a_swap(
    serve: Serve, rows: Rows, quick: None, two: tuple[FakeEngine, FakeEngine], tmp_path: Path
) -> None:
    for engine in two:
        engine.logprobs = {NEW: -2.0}
    client = serve_both(serve, *two)
    two[0].hangs, two[0].hang_seconds = True, 6.0
    assert two[0].looked_at.wait(60)
    time.sleep(2 * fleet.SILENT_SECONDS)  # since when it has been silent
    num_asked = len(two[0].asked)
    for _ in range(5):
        assert client.post(CHAT, json=ask()).status_code == 200
    assert len(two[0].asked) == num_asked
    publish(rows, NEW, make_folder(tmp_path / NEW))
    wait_until(lambda: rows(POINTER) == [(NEW, BASE, None)])
    assert client.post(CHAT, json=ask()).status_code == 200


def change(client: httpx.Client, url: str, state: str) -> httpx.Response:
    return client.put(REPLICAS, json={"url": url, "state": state, "reason": "a test"})


@pytest.fixture
def addressed() -> tuple[FakeEngine, FakeEngine]:
    """Two whose addresses an operator could give."""
    first, second = "http://127.0.0.1:7001", "http://127.0.0.1:7002"
    return FakeEngine(url=first, replies=("from a",)), FakeEngine(url=second, replies=("from b",))


def test_what_was_read_before_a_replica_is_drained_is_not_followed_after_it(
    serve: Serve, addressed: tuple[FakeEngine, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read, may_go_on = 0, math.inf

    async def read(*asked: Any) -> Any:
        nonlocal num_read
        found = await replicas.read(*asked)
        num_read += 1
        number = num_read
        while number > may_go_on:
            await asyncio.sleep(0.01)
        return found

    monkeypatch.setattr(reconciler, "replicas", SimpleNamespace(read=read))
    first, second = addressed
    client = serve_both(serve, first, second)
    before = may_go_on = num_read
    wait_until(lambda: num_read > before)  # one tick has read that both serve
    try:
        assert change(client, first.url, "draining").status_code == 200
        may_go_on = before + 1
        wait_until(lambda: num_read > before + 1)  # and has done what it does, as the next has read
        answers = [client.post(CHAT, json=ask()).json() for _ in range(5)]
    finally:
        may_go_on = math.inf
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {"from b"}


def test_replicas_are_added_drained_and_removed_while_it_runs_and_it_is_on_record(
    serve: Serve, addressed: tuple[FakeEngine, FakeEngine]
) -> None:
    first, second = addressed
    client = serve(first, second, engine_urls=(first.url,))
    assert states(client) == {first.url: ("serving", True)}
    assert change(client, second.url + "/", "serving").status_code == 200
    wait_until(lambda: states(client)[second.url] == ("serving", True))
    assert change(client, first.url, "draining").status_code == 200
    num_asked = len(first.asked)
    assert {client.post(CHAT, json=ask()).json()["choices"][0]["message"]["content"] for _ in range(5)} == {
        "from b"
    }
    assert len(first.asked) == num_asked
    assert states(client)[first.url] == ("draining", True)
    assert change(client, first.url, "removed").status_code == 200
    assert states(client) == {second.url: ("serving", True)}
    assert f'replica="{first.url}"' not in client.get("/metrics").text
    done = [(row["action"], row["subject"], row["reason"]) for row in client.get("/operator/actions").json()]
    assert done == [
        ("remove replica", first.url, "a test"),
        ("drain replica", first.url, "a test"),
        ("add replica", second.url, "a test"),
    ]
    again = serve(first, second, engine_urls=(first.url,))  # the settings still name it
    wait_until(lambda: states(again) == {second.url: ("serving", True)})


def test_a_new_replica_gets_no_request_before_it_holds_and_reproduces_the_live_policy(
    serve: Serve, rows: Rows, addressed: tuple[FakeEngine, FakeEngine], tmp_path: Path
) -> None:
    first, second = addressed
    first.logprobs, second.logprobs = {NEW: -2.0}, {NEW: -9.0}
    client = serve(first, second, engine_urls=(first.url,))
    publish(rows, NEW, make_folder(tmp_path / NEW))
    wait_until(lambda: rows(POINTER) == [(NEW, BASE, None)])
    change(client, second.url, "serving")
    wait_until(lambda: client.get(REPLICAS).json()[1]["refused"].keys() == {NEW})
    assert "log-probabilities differ" in client.get(REPLICAS).json()[1]["refused"][NEW]
    assert {client.post(CHAT, json=ask()).json()["choices"][0]["message"]["content"] for _ in range(5)} == {
        "from a"
    }
    assert change(client, first.url, "draining").json()["error"]["code"] == "last_replica"
    by_name = client.post(CHAT, json=ask() | {"model": BASE})
    assert by_name.status_code == 200  # which both hold


def test_the_last_replica_that_answers_is_neither_drained_nor_removed(
    serve: Serve, rows: Rows, addressed: tuple[FakeEngine, FakeEngine]
) -> None:
    first, second = addressed
    client = serve(first, second, engine_urls=(first.url,))
    second.alive = False
    change(client, second.url, "serving")
    for state in ("draining", "removed"):
        error = change(client, first.url, state)
        assert (error.status_code, error.json()["error"]["code"]) == (409, "last_replica")
        assert change(client, "http://127.0.0.1:7003", state).json()["error"]["code"] == "replica_not_found"
    assert change(client, second.url, "removed").status_code == 200
    first.alive = False  # also where it is as good as gone
    wait_until(lambda: not healthy(client, first.url))
    assert change(client, first.url, "removed").json()["error"]["code"] == "last_replica"
    assert rows("SELECT url, state FROM replicas") == [(second.url, "removed")]


def test_a_removed_replica_ends_the_requests_that_it_has(
    serve: Serve, addressed: tuple[FakeEngine, FakeEngine]
) -> None:
    first, second = addressed
    client = serve_both(serve, first, second)
    first.pause_seconds = 0.7
    with client.stream("POST", CHAT, json=ask(stream=True)) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert change(client, first.url, "removed").status_code == 200
        rest = "".join(lines)
    assert rest.endswith("data: [DONE]")
    assert '"a"' in rest


def test_the_command_line_lists_adds_drains_and_removes(
    serve: Serve, addressed: tuple[FakeEngine, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = addressed
    client = serve(first, second, engine_urls=(first.url,))
    monkeypatch.setenv("COLUMNS", "200")
    ratchet = command_line(client, monkeypatch)
    refused = ratchet("replica", "drain", first.url)
    assert (refused.exit_code, "Add another one" in refused.output) == (1, True)
    assert second.url in ratchet("replica", "add", second.url, "--why", "more users").output
    wait_until(lambda: states(client)[second.url] == ("serving", True))
    assert ratchet("replica", "drain", first.url).exit_code == 0
    shown = ratchet("replica", "list").output.splitlines()
    assert [line.split()[:4] for line in shown[1:]] == [
        [first.url, "draining", "True", "0"],
        [second.url, "serving", "True", "0"],
    ]
    assert first.url not in ratchet("replica", "remove", first.url).output
    assert client.get("/operator/actions").json()[-1]["reason"] == "more users"
