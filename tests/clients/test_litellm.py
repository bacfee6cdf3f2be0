"""LiteLLM as a client, in the environment of its own that `make test` sets up: the service is its `api_base`."""

import os
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
    ("unknown model", "NotFoundError", 404),
    ("bad temperature", "BadRequestError", 400),
    ("too long", "ContextWindowExceededError", 400),  # LiteLLM's own, as the next but one
    ("wrong key", "AuthenticationError", 401),
    ("key needed", "AuthenticationError", 401),
    ("too many calls", "RateLimitError", 429),
    ("engine gone", "ServiceUnavailableError", 503),
]
# Else it asks the network for a list of prices while it starts.
ENVIRONMENT = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    log = tmp_path_factory.mktemp("litellm") / "log"
    with running_peer([PEERS / "python", HERE / "litellm_client.py"], log, ENVIRONMENT) as peer:
        yield peer


def check(shown: dict[str, Any], told: dict[str, Any], model: str) -> None:
    """A `ModelResponse` holds the answer that plain HTTP gives."""
    [choice] = shown["choices"]
    assert choice["message"]["content"] == told["choices"][0]["message"]["content"]
    assert (choice["message"]["role"], choice["finish_reason"]) == ("assistant", "length")
    assert {name: shown["usage"][name] for name in told["usage"]} == told["usage"]
    assert shown["model"] == model


@pytest.mark.parametrize("call", ["completion", "acompletion"])
def test_it_shows_the_answer_as_it_is(
    litellm: Peer, service: httpx.Client, told: dict[str, Any], call: str
) -> None:
    check(litellm.done(call, service, **ASKED), told, model="policy-000000")
    letter, before = cut(told["choices"][0]["message"]["content"])
    [choice] = litellm.done(call, service, **ASKED, stop=letter)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (before, "stop")


@pytest.mark.parametrize("call", ["stream", "astream"])
def test_it_streams_the_same_answer(
    litellm: Peer, service: httpx.Client, told: dict[str, Any], call: str
) -> None:
    *pieces, last = litellm.events(call, service, **ASKED)
    check(last["done"], told, model="ratchet")  # in a stream it writes the name that it was asked for
    assert "".join(event["piece"] for event in pieces) == told["choices"][0]["message"]["content"]


@pytest.mark.parametrize("call", ["stream", "astream"])
def test_each_piece_is_shown_before_the_next_is_made(litellm: Peer, serve: Serve, call: str) -> None:
    engine = LockstepEngine()
    events = litellm.events(call, serve(engine), text="hi")
    shown = (event["piece"] for event in events if event.get("piece"))
    for word in ("one ", "two ", "three"):
        engine.let.release()
        assert next(shown) == word
    assert list(shown) == []


@pytest.mark.parametrize("call", ["stream", "astream"])
def test_a_stream_that_is_closed_early_ends_the_generation(litellm: Peer, serve: Serve, call: str) -> None:
    engine = LockstepEngine()
    engine.let.release()
    seen = litellm.done(call, serve(engine), text="hi", close_after=2)
    assert seen["choices"][0]["message"]["content"].startswith("one")
    wait_until(lambda: engine.aborted == 1)


def test_it_gets_two_replies_and_their_vote_counts(litellm: Peer, service: httpx.Client, rows: Rows) -> None:
    extra = {
        "comparison": "always",
        "user": VOTABLE["user"],
    }  # it drops `user` for models that it does not know
    shown = litellm.done("completion", service, **VOTABLE, extra_body=extra)
    first, second = (choice["message"]["content"] for choice in shown["choices"])
    assert first != second
    vote = {"choice": "second", "user": "ada"}
    service.put(f"/v1/comparisons/{shown['comparison']['id']}/vote", json=vote).raise_for_status()
    assert rows("SELECT choice FROM votes") == [("second",)]


@pytest.mark.parametrize(("name", "kind", "status"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_refusal_is_its_own_kind_of_error(
    litellm: Peer, fault: Fault, name: str, kind: str, status: int
) -> None:
    service, change = fault(name)
    for call in ("completion", "acompletion", "stream", "astream"):
        error = litellm.error(call, service, **{"text": "hi", "max_tokens": 4} | change)
        assert error["classes"][0] == kind
        assert error["status"] == status


@pytest.mark.parametrize("call", ["stream", "astream"])
def test_an_engine_that_breaks_midway_is_an_error_and_no_short_answer(
    litellm: Peer, fault: Fault, call: str
) -> None:
    service, _ = fault("breaks midway")
    error = litellm.error(call, service, text="hi")
    assert "APIError" in error["classes"]
    assert "engine went away" in error["message"]
