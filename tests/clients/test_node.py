"""OpenAI's client for Node, in the Node that `make test` sets up; the other side is `node/client.mjs`."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.clients.conftest import ASKED, VOTABLE, Fault, cut
from tests.clients.lockstep import LockstepEngine
from tests.clients.peer import HERE, PEERS, Peer, running_peer
from tests.service.conftest import Rows, Serve, wait_until
from tests.service.fake_engine import FakeEngine

pytestmark = [pytest.mark.engine, pytest.mark.database]
FAULTS = [
    ("unknown model", "NotFoundError", 404, "model_not_found"),
    ("bad temperature", "BadRequestError", 400, None),
    ("too long", "BadRequestError", 400, "context_length_exceeded"),
    ("wrong key", "AuthenticationError", 401, "invalid_api_key"),
    ("key needed", "AuthenticationError", 401, "invalid_api_key"),
    ("too many calls", "RateLimitError", 429, "rate_limit_exceeded"),
    ("engine gone", "InternalServerError", 503, "engine_not_ready"),
]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    log = tmp_path_factory.mktemp("node") / "log"
    with running_peer([PEERS / "node", HERE / "node" / "client.mjs"], log) as peer:
        yield peer


def test_it_shows_the_answer_as_it_is(node: Peer, service: httpx.Client, told: dict[str, Any]) -> None:
    answer = node.done("create", service, **ASKED)
    changing = {"id", "created", "choices"}
    assert {name: answer[name] for name in told.keys() - changing} == {
        name: told[name] for name in told.keys() - changing
    }
    assert answer["choices"][0]["message"] == told["choices"][0]["message"]
    assert answer["choices"][0]["finish_reason"] == "length"
    letter, before = cut(told["choices"][0]["message"]["content"])
    [choice] = node.done("create", service, **ASKED, stop=letter)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (before, "stop")


def test_it_streams_the_same_answer(node: Peer, service: httpx.Client, told: dict[str, Any]) -> None:
    *pieces, event = node.events("stream", service, **ASKED)
    *body, last = event["done"]
    assert "".join(event["piece"] for event in pieces) == told["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in body] == [None] * (len(body) - 1) + ["length"]
    assert (last["choices"], last["usage"]) == ([], told["usage"])


def test_its_stream_helper_puts_the_answer_together(
    node: Peer, service: httpx.Client, told: dict[str, Any]
) -> None:
    *pieces, event = node.events("helper", service, **ASKED)
    [choice] = event["done"]["choices"]
    text = "".join(event["piece"] for event in pieces)
    assert text == choice["message"]["content"] == told["choices"][0]["message"]["content"]
    assert choice["finish_reason"] == "length"


def test_each_piece_is_shown_before_the_next_is_made(node: Peer, serve: Serve) -> None:
    engine = LockstepEngine()
    events = node.events("stream", serve(engine), text="hi")
    shown = (event["piece"] for event in events if event.get("piece"))
    for word in ("one ", "two ", "three"):
        engine.let.release()
        assert next(shown) == word
    assert list(shown) == []


def test_a_stream_that_is_closed_early_ends_the_generation(node: Peer, serve: Serve) -> None:
    engine = LockstepEngine()
    engine.let.release()
    assert len(node.done("stream", serve(engine), text="hi", close_after=2)) == 2
    wait_until(lambda: engine.aborted == 1)


@pytest.mark.parametrize(
    ("call", "kind", "fields"),
    [
        ("create", "APIConnectionTimeoutError", {"timeout": 5000}),
        ("abort", "APIUserAbortError", {"after_milliseconds": 5000}),
    ],
)
def test_so_does_one_that_times_out_or_is_aborted(
    node: Peer, serve: Serve, call: str, kind: str, fields: dict[str, Any]
) -> None:
    engine = LockstepEngine()
    assert node.error(call, serve(engine), text="hi", **fields)["classes"][0] == kind
    wait_until(lambda: engine.aborted == 1)


def test_it_gets_two_replies_and_their_vote_counts(node: Peer, service: httpx.Client, rows: Rows) -> None:
    answer = node.done("create", service, **VOTABLE, comparison="always")
    first, second = (choice["message"]["content"] for choice in answer["choices"])
    assert first != second
    assert answer["model"] == "ratchet"  # blind
    vote = {"comparison": answer["comparison"]["id"], "choice": "second", "user": "ada"}
    assert node.done("vote", service, **vote)["policies"] == ["policy-000000", "policy-000000"]
    assert rows("SELECT choice FROM votes") == [("second",)]


def test_its_stream_helper_tells_two_replies_apart(node: Peer, serve: Serve) -> None:
    answer = node.done("helper", serve(FakeEngine()), text="hi", comparison="always")
    shown = {choice["index"]: choice["message"]["content"] for choice in answer["choices"]}
    assert sorted(shown.values()) == ["one two", "three four"]
    assert set(shown) == {0, 1}


def test_it_lists_and_reads_models(node: Peer, service: httpx.Client) -> None:
    assert [model["id"] for model in node.done("models", service)] == ["ratchet", "policy-000000"]
    assert node.done("model", service, model="policy-000000")["object"] == "model"
    assert node.error("model", service, model="gpt-9")["classes"][0] == "NotFoundError"


def test_its_response_has_our_headers(node: Peer, service: httpx.Client) -> None:
    seen = node.done("headers", service, text="hi", max_tokens=2, spice=1)
    assert seen["headers"]["x-ratchet-policy"] == seen["model"] == "policy-000000"
    assert seen["headers"]["x-ratchet-ignored"] == "spice"
    assert seen["request_id"].startswith("req-")


@pytest.mark.parametrize(("name", "kind", "status", "code"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_refusal_is_its_own_kind_of_error(
    node: Peer, fault: Fault, name: str, kind: str, status: int, code: str | None
) -> None:
    service, change = fault(name)
    for call in ("create", "stream"):
        error = node.error(call, service, **{"text": "hi", "max_tokens": 4} | change)
        assert (error["classes"][0], error["status"], error["code"]) == (kind, status, code)


def test_an_engine_that_breaks_midway_is_an_error_and_no_short_answer(node: Peer, fault: Fault) -> None:
    service, _ = fault("breaks midway")
    error = node.error("stream", service, text="hi")
    assert error["classes"][0] == "APIError"
    assert "engine went away" in error["message"]
