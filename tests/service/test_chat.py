"""Chat, over HTTP and with a real database; the engine is a fake that can be told to fail."""

import asyncio
import json
import threading

import httpx
import pytest
from fastapi import APIRouter

from service.auth import KNOWN_CALLER
from service.chat import chat
from service.chat_route import ChatRoute
from service.journal import Journal
from tests.service.conftest import Rows, Serve, ask, chunks, wait_until
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
CHAT = "/v1/chat/completions"


def test_a_whole_answer_names_its_policy_and_is_stored(serve: Serve, rows: Rows) -> None:
    answer = serve(FakeEngine()).post(CHAT, json=ask("what is it?", user="ada"))
    body = answer.json()
    assert answer.headers["x-ratchet-policy"] == body["model"] == "policy-000000"
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "one two",
        "refusal": None,
    }
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert "comparison" not in body
    [(content, reason, prompt_tokens, tokens, messages, user)] = rows(
        "SELECT content, finish_reason, prompt_tokens, completion_tokens, messages, name FROM replies r"
        " JOIN prompts p ON p.id = r.prompt_id JOIN users u ON u.id = p.user_id WHERE r.id = %s",
        body["id"],
    )
    assert (content, reason, prompt_tokens, tokens, user) == ("one two", "stop", 7, 2, "ada")
    assert messages == [{"role": "user", "content": "what is it?"}]


def test_a_stream_has_openais_shape(serve: Serve) -> None:
    answer = serve(FakeEngine()).post(CHAT, json=ask(stream=True, stream_options={"include_usage": True}))
    first, *middle, last = chunks(answer)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "one two"
    assert [chunk["choices"][0]["finish_reason"] for chunk in middle] == [None, "stop"]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 9
    assert all(chunk["usage"] is None for chunk in [first, *middle])
    assert {chunk["id"] for chunk in [first, *middle, last]} == {first["choices"][0]["reply_id"]}


def test_a_replys_row_is_there_before_its_id_leaves_and_whole_before_its_last_chunk(
    serve: Serve, rows: Rows
) -> None:
    engine = FakeEngine(may_end=threading.Event())
    client = serve(engine)
    with client.stream("POST", CHAT, json=ask(stream=True)) as answer:
        events = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))
        reply_id = next(events)["id"]
        assert rows("SELECT content FROM replies WHERE id = %s", reply_id) == [(None,)]
        engine.may_end.set()
        while next(events)["choices"][0]["finish_reason"] is None:
            pass
        assert rows("SELECT content FROM replies WHERE id = %s", reply_id) == [("one two",)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_comparison_shows_both_replies_in_stored_order_and_hides_the_policy(
    serve: Serve, rows: Rows, stream: bool
) -> None:
    engine = FakeEngine()
    client = serve(engine)
    firsts = set()
    for _ in range(24):
        answer = client.post(CHAT, json=ask(comparison="always", stream=stream))
        assert "policy-" not in answer.text
        assert "x-ratchet-policy" not in answer.headers
        texts = {0: "", 1: ""}
        if stream:
            first, last = (chunk["comparison"] for chunk in chunks(answer) if "comparison" in chunk)
            assert (first, last) == (
                {"id": first["id"]},
                {"id": first["id"], "votable": True, "why_not": None},
            )
            assert chunks(answer)[-1]["comparison"] == last
            comparison = chunks(answer)[0]["comparison"]["id"]
            for chunk in chunks(answer):
                texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
        else:
            comparison = answer.json()["comparison"]["id"]
            texts = {choice["index"]: choice["message"]["content"] for choice in answer.json()["choices"]}
        assert answer.headers["x-ratchet-comparison"] == comparison
        stored = rows(
            "SELECT position, content FROM comparison_replies JOIN replies ON id = reply_id"
            " WHERE comparison_id = %s ORDER BY position",
            comparison,
        )
        assert dict(stored) == texts
        assert set(texts.values()) == {"one two", "three four"}
        firsts.add(texts[0])
    assert len(firsts) == 2  # by chance always the same: 1 in 8 million
    assert {asked[3] for asked in engine.asked} == {2}
    assert rows("SELECT DISTINCT reason, propensity FROM comparisons") == [("always", 1.0)]


def test_auto_shows_two_at_the_rate_set_and_stores_it(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(), comparison_rate=0.5, evaluation_rate=0.0)
    shown = ["comparison" in client.post(CHAT, json=ask(comparison="auto")).json() for _ in range(24)]
    assert 2 <= sum(shown) <= 22
    assert rows("SELECT DISTINCT reason, propensity FROM comparisons") == [("auto", 0.5)]


def test_auto_stops_at_the_users_cap_but_for_the_evaluation_slice(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(), comparison_rate=1.0, evaluation_rate=0.3, comparisons_per_hour=2)
    for _ in range(40):
        client.post(CHAT, json=ask(comparison="auto", user="ada"))
    counts = dict(rows("SELECT reason, count(*) FROM comparisons GROUP BY 1"))
    assert counts["auto"] == 2
    assert counts["evaluation"] >= 2  # by chance fewer: 1 in 100,000
    propensities = {round(p, 6) for (p,) in rows("SELECT DISTINCT propensity FROM comparisons")}
    assert propensities <= {1.0, 0.3}
    assert 0.3 in propensities
    shown = "comparison" in client.post(CHAT, json=ask(comparison="always", user="ada")).json()
    assert shown  # the cap is for what the service chooses to show


def test_who_opted_out_is_shown_no_comparison_unasked(serve: Serve) -> None:
    client = serve(FakeEngine(), comparison_rate=1.0, evaluation_rate=1.0)
    assert client.patch("/v1/users/me", params={"user": "ada"}, json={"compares": False}).status_code == 200
    body = ask(comparison="auto", user="ada")
    assert not any("comparison" in client.post(CHAT, json=body).json() for _ in range(8))
    client.patch("/v1/users/me", params={"user": "ada"}, json={"compares": True})
    assert "comparison" in client.post(CHAT, json=body).json()


BAD = {
    "empty list": (ask() | {"messages": []}, "messages"),
    "no messages": ({"model": "ratchet"}, "messages"),
    "last not user": (ask() | {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    "unknown role": (ask() | {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    "image": (ask([{"type": "image_url", "image_url": {"url": "x"}}]), "messages.0.content"),  # type: ignore[arg-type]
    "number": (ask(3), "messages.0.content"),  # type: ignore[arg-type]
    "nul": (ask("a\0b"), "messages.0.content"),
    "surrogate": (ask("a\ud800b"), "messages.0.content"),
    "nul in user": (ask(user="a\0"), "user"),
    "n": (ask(n=2), "n"),
    "temperature": (ask(temperature=3), "temperature"),
    "max_tokens": (ask(max_tokens=0), "max_tokens"),
    "seed": (ask(seed=1 << 63), "seed"),
    "stops": (ask(stop=list("abcde")), "stop"),
    "greedy comparison": (ask(temperature=0, comparison="always"), "comparison"),
    "named comparison": (ask(comparison="always") | {"model": "policy-000000"}, "comparison"),
}


def test_bad_requests_get_a_400_that_names_the_field(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    for name, (body, param) in BAD.items():
        # json.dumps keeps the lone surrogate as an escape, as a careless client would
        answer = client.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), (
            name
        )
        assert error["message"], name
    assert rows("SELECT count(*) FROM prompts") == [(0,)]


def test_a_body_that_is_no_json_or_too_large_is_told_so(serve: Serve) -> None:
    client = serve(FakeEngine())
    headers = {"content-type": "application/json"}
    assert client.post(CHAT, content="{no", headers=headers).json()["error"]["code"] == "invalid_json"
    assert client.post(CHAT, content=b"\xff\xfe{", headers=headers).status_code == 400
    assert client.post(CHAT, content="[" * 100_000, headers=headers).status_code == 400
    assert client.post(CHAT, json=ask("x" * (1 << 20))).status_code == 413


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"]
)
def test_json_is_read_whatever_it_is_called(serve: Serve, kind: str) -> None:
    body = json.dumps(ask("what is it?"))
    answer = serve(FakeEngine()).post(CHAT, content=body, headers={"content-type": kind})
    assert answer.json()["choices"][0]["message"]["content"] == "one two"


def test_an_unknown_model_is_told_which_exist(serve: Serve) -> None:
    answer = serve(FakeEngine()).post(CHAT, json=ask() | {"model": "gpt-4o"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "ratchet, policy-000000" in answer.json()["error"]["message"]


def test_unknown_fields_are_ignored_and_named(serve: Serve) -> None:
    engine = FakeEngine()
    answer = serve(engine).post(CHAT, json=ask(logit_bias={"1": 5}, **{"bad\nname": 1}))
    assert answer.headers["x-ratchet-ignored"] == "logit_bias"


def test_text_parts_developer_and_the_newer_token_limit_are_understood(serve: Serve) -> None:
    engine = FakeEngine()
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    serve(engine).post(CHAT, json={"messages": messages, "max_completion_tokens": 3, "stop": "x", "seed": 5})
    _, sent, sampling, _ = engine.asked[0]
    assert [(message.role, message.content) for message in sent] == [("system", "be kind"), ("user", "ab")]
    assert (sampling.max_tokens, sampling.stop, sampling.seed) == (3, ("x",), 5)


def test_tokens_asked_for_are_cut_to_the_context(serve: Serve) -> None:
    engine = FakeEngine()
    serve(engine).post(CHAT, json=ask(max_tokens=100_000))
    assert engine.asked[0][2].max_tokens == 512


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_names_another_policy_ends_the_request(serve: Serve, rows: Rows, stream: bool) -> None:
    client = serve(FakeEngine(model="policy-000009"))
    before = _mixed(client)
    answer = client.post(CHAT, json=ask(stream=stream))
    error = chunks(answer)[-1]["error"] if stream else answer.json()["error"]
    assert "another policy" in error["message"]
    assert answer.text.count("[DONE]") == 0
    assert _mixed(client) == before + 1
    assert rows("SELECT finish_reason FROM replies") == [("error",)]


def _mixed(client: httpx.Client) -> float:
    line = next(
        line for line in client.get("/metrics").text.splitlines() if line.startswith("ratchet_mixed_policy_")
    )
    return float(line.split()[1])


def test_an_engine_that_breaks_off_keeps_what_had_come(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(breaks_after=1))
    assert client.post(CHAT, json=ask()).status_code == 503
    assert "error" in chunks(client.post(CHAT, json=ask(stream=True)))[-1]
    assert rows("SELECT content, finish_reason FROM replies") == [("one ", "error")] * 2


def test_a_stream_that_fails_before_its_first_token_names_its_reply(serve: Serve, rows: Rows) -> None:
    answer = serve(FakeEngine(breaks_after=0)).post(CHAT, json=ask(stream=True))
    opening, error = chunks(answer)
    assert rows("SELECT id, finish_reason FROM replies") == [(opening["id"], "error")]
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "error" in error


def test_a_dependency_that_a_chat_route_would_not_ask_is_refused() -> None:
    router = APIRouter(route_class=ChatRoute, dependencies=[KNOWN_CALLER])
    with pytest.raises(TypeError, match="not asked"):
        router.post("/other")(chat)


def test_rows_that_are_on_their_way_at_the_deadline_are_stored_once(
    serve: Serve, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Journal._store

    async def late(written: "asyncio.Future[None]") -> None:
        await written
        await asyncio.sleep(0.6)  # committed, and not yet known to be

    monkeypatch.setattr(
        Journal, "_store", lambda journal, what: asyncio.ensure_future(late(store(journal, what)))
    )
    client = serve(FakeEngine(), request_deadline_seconds=0.2)
    assert client.post(CHAT, json=ask(stream=True)).status_code == 504
    wait_until(lambda: rows("SELECT finish_reason FROM replies") == [("error",)])


def test_an_answer_past_its_deadline_is_aborted(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine(pause_seconds=5)
    answer = serve(engine, request_deadline_seconds=0.3).post(CHAT, json=ask())
    assert answer.status_code == 504
    assert engine.aborted == 1
    assert rows("SELECT finish_reason FROM replies") == [("error",)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_before_the_first_token_aborts_the_generation(
    serve: Serve, rows: Rows, stream: bool
) -> None:
    engine = FakeEngine(pause_seconds=30)
    client = serve(engine)
    with (
        pytest.raises(httpx.ReadTimeout),
        client.stream("POST", CHAT, json=ask(stream=stream), timeout=3) as answer,
    ):
        answer.read()
    wait_until(lambda: engine.aborted == 1)
    wait_until(lambda: rows("SELECT content, finish_reason FROM replies") == [("", "abort")])


def test_a_replica_that_died_is_passed_over(serve: Serve) -> None:
    first, second = FakeEngine(url="a"), FakeEngine(url="b")
    client = serve(first, second)
    wait_until(lambda: all(row["healthy"] for row in client.get("/operator/replicas").json()))
    first.alive = False
    assert [client.post(CHAT, json=ask()).status_code for _ in range(4)] == [200] * 4
    second.alive = False
    dead = client.post(CHAT, json=ask())
    assert (dead.status_code, dead.headers["retry-after"]) == (503, "1")
