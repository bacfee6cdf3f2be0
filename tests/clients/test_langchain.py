"""LangChain's `ChatOpenAI`, in the environment of its own that `make test` sets up."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.clients.conftest import ASKED, VOTABLE, Fault, cut
from tests.clients.lockstep import LockstepEngine
from tests.clients.peer import HERE, PEERS, Peer, running_peer
from tests.service.conftest import Rows, Serve, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.database]
FAULTS = [
    ("unknown model", "NotFoundError", 404, "model_not_found"),
    ("bad temperature", "BadRequestError", 400, None),
    ("too long", "ContextOverflowError", 400, "context_length_exceeded"),  # LangChain's own
    ("wrong key", "AuthenticationError", 401, "invalid_api_key"),
    ("key needed", "AuthenticationError", 401, "invalid_api_key"),
    ("too many calls", "RateLimitError", 429, "rate_limit_exceeded"),
    ("engine gone", "InternalServerError", 503, "engine_not_ready"),
]


@pytest.fixture(scope="module")
def langchain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    log = tmp_path_factory.mktemp("langchain") / "log"
    with running_peer([PEERS / "python", HERE / "langchain_client.py"], log) as peer:
        yield peer


def check(shown: dict[str, Any], told: dict[str, Any]) -> None:
    """A message of LangChain's holds the answer that plain HTTP gives."""
    assert shown["text"] == told["choices"][0]["message"]["content"]
    assert (shown["finish_reason"], shown["model"]) == ("length", "policy-000000")
    usage = told["usage"]
    assert shown["usage"]["input_tokens"] == usage["prompt_tokens"]
    assert shown["usage"]["output_tokens"] == usage["completion_tokens"]
    assert shown["usage"]["total_tokens"] == usage["total_tokens"]


@pytest.mark.parametrize("call", ["invoke", "ainvoke"])
def test_it_shows_the_answer_as_it_is(
    langchain: Peer, service: httpx.Client, told: dict[str, Any], call: str
) -> None:
    check(langchain.done(call, service, **ASKED), told)
    letter, before = cut(told["choices"][0]["message"]["content"])
    stopped = langchain.done(call, service, **ASKED, stop=letter)
    assert (stopped["text"], stopped["finish_reason"]) == (before, "stop")


@pytest.mark.parametrize("call", ["stream", "astream"])
def test_it_streams_the_same_answer(
    langchain: Peer, service: httpx.Client, told: dict[str, Any], call: str
) -> None:
    *pieces, last = langchain.events(call, service, **ASKED, stream_usage=True)
    check(last["done"], told)
    assert "".join(event["piece"] for event in pieces) == last["done"]["text"]


def test_a_batch_gets_its_answers_in_order(langchain: Peer, service: httpx.Client) -> None:
    questions = ["word " * number for number in range(1, 9)]
    answers = langchain.done("batch", service, texts=questions, max_tokens=4)
    alone = [langchain.done("invoke", service, text=question, max_tokens=1) for question in questions]
    asked = [answer["usage"]["input_tokens"] for answer in answers]
    assert asked == [answer["usage"]["input_tokens"] for answer in alone]
    assert len(set(asked)) == len(questions)


@pytest.mark.parametrize("call", ["stream", "astream"])
def test_each_piece_is_shown_before_the_next_is_made(langchain: Peer, serve: Serve, call: str) -> None:
    engine = LockstepEngine()
    events = langchain.events(call, serve(engine), text="hi")
    shown = (event["piece"] for event in events if event.get("piece"))
    for word in ("one ", "two ", "three"):
        engine.let.release()
        assert next(shown) == word
    assert list(shown) == []


@pytest.mark.parametrize("call", ["stream", "astream"])
def test_a_stream_that_is_closed_early_ends_the_generation(langchain: Peer, serve: Serve, call: str) -> None:
    engine = LockstepEngine()
    engine.let.release()
    assert langchain.done(call, serve(engine), text="hi", close_after=2)["text"] == "one "
    wait_until(lambda: engine.aborted == 1)


def test_it_gets_two_replies_and_their_vote_counts(
    langchain: Peer, service: httpx.Client, rows: Rows
) -> None:
    """By `generate`, as `invoke` shows the first alone."""
    shown = langchain.done("generate", service, **VOTABLE, extra_body={"comparison": "always"})
    first, second = shown["texts"]
    assert first != second
    vote = {"choice": "second", "user": "ada"}
    service.put(f"/v1/comparisons/{shown['id']}/vote", json=vote).raise_for_status()
    assert rows("SELECT choice FROM votes") == [("second",)]


@pytest.mark.parametrize(("name", "kind", "status", "code"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_refusal_is_its_own_kind_of_error(
    langchain: Peer, fault: Fault, name: str, kind: str, status: int, code: str | None
) -> None:
    service, change = fault(name)
    for call in ("invoke", "ainvoke", "stream", "astream"):
        error = langchain.error(call, service, **{"text": "hi", "max_tokens": 4} | change)
        assert kind in error["classes"]
        assert (error["status"], error["code"]) == (status, code)


@pytest.mark.parametrize("call", ["stream", "astream"])
def test_an_engine_that_breaks_midway_is_an_error_and_no_short_answer(
    langchain: Peer, fault: Fault, call: str
) -> None:
    service, _ = fault("breaks midway")
    error = langchain.error(call, service, text="hi")
    assert "APIError" in error["classes"]
    assert "engine went away" in error["message"]
