"""Input that is wrong, huge or hostile: each a clear 4xx in OpenAI's shape, and nothing of it reaches the engine."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.edge import MOST_BODY_BYTES
from service.schemas import MOST_MESSAGES
from service.settings import Settings
from tests.service.conftest import Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
CHAT = "/v1/chat/completions"
VOTE = "/v1/comparisons/cmp-1/vote"
RANKING = "/v1/comparisons/cmp-1/ranking"
# Every call with a body, and in it every text field that it takes.
FULL: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", CHAT): {**ask(), "stop": ["x"], "user": "ada", "conversation": "conv-1", "follows": "r"},
    ("POST", "/v1/comparisons"): {"messages": [{"role": "user", "content": "hi"}], "user": "ada"},
    ("PUT", VOTE): {"choice": "first", "comment": "c", "tags": ["t"], "user": "ada"},
    ("PUT", RANKING): {"ranks": [1, 2], "comment": "c", "tags": ["t"], "user": "ada"},
    ("POST", "/v1/demonstrations"): {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "corrects": "r",
        "content": "x",
        "comment": "c",
        "tags": ["t"],
        "user": "ada",
    },
    ("POST", "/v1/conversations"): {"user": "ada"},
    ("POST", "/v1/markdown"): {"texts": ["*hi*"]},
    ("PATCH", "/v1/users/me"): {"compares": True},
    ("POST", "/operator/keys"): {"account": "acme"},
    ("PUT", "/operator/replicas"): {"url": "http://127.0.0.1:8001", "state": "serving", "reason": "r"},
    ("POST", "/operator/cycles"): {"reason": "r"},
    **{
        ("POST", f"/operator/{call}"): {"reason": "r", "policy": "p"}
        for call in ("promote", "reject", "rollback")
    },
}
NOT_TEXT = {"role", "type", "choice", "comparison", "expires_at", "state", "method"}
"""Strings of a few values or of a format: whatever else they hold is refused anyway."""


def refused(
    answer: httpx.Response, status: int = 400, *, param: str | None = None, code: str | None = None
) -> None:
    """A clear error in OpenAI's shape, that does not repeat what was sent."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] in ("invalid_request_error", "authentication_error")
    assert 10 < len(error["message"]) < 500
    assert not set("()[]") & set(error["param"] or ""), error  # a path in the body, not one in our code
    if param is not None:
        assert (error["param"] or "").split(".")[0] == param, error
    if code is not None:
        assert error["code"] == code


def send(client: httpx.Client, method: str, path: str, body: object, **headers: str) -> httpx.Response:
    """As Python's json writes it: half characters escaped, NaN as it is."""
    headers = {"content-type": "application/json", **headers}
    return client.request(method, path, content=json.dumps(body), headers=headers)


def spoilt(body: Any, bad: str) -> Iterator[tuple[str, Any]]:
    """The body once for each text in it, with `bad` put into that one; and the field's name."""
    items = body.items() if isinstance(body, dict) else enumerate(body)
    for name, value in items:
        if isinstance(value, dict | list):
            inner = [(field, changed) for field, changed in spoilt(value, bad)]
        else:
            inner = [("", f"a{bad}b")] if isinstance(value, str) and name not in NOT_TEXT else []
        for field, changed in inner:
            copy = body.copy()
            copy[name] = changed
            yield (str(name) if isinstance(body, dict) else field), copy


def test_the_bodies_below_name_every_call_and_every_text_field() -> None:
    document = create_app(Settings()).openapi()
    schemas = document["components"]["schemas"]
    calls = {
        (method.upper(), path.replace("{comparison_id}", "cmp-1")): operation["requestBody"]
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if "application/json"
        in operation.get("requestBody", {"content": {}})["content"]  # an import is a file
    }
    assert calls.keys() == FULL.keys()
    for call, body in calls.items():
        schema = body["content"]["application/json"]["schema"]
        reference = schema.get("$ref") or schema["anyOf"][0]["$ref"]
        fields = schemas[reference.split("/")[-1]]["properties"]
        texts = {name for name, field in fields.items() if '"string"' in json.dumps(field)} - NOT_TEXT
        assert texts <= FULL[call].keys(), call


@pytest.mark.parametrize("bad", ["\0", "\ud800", "\udc00\ud800"], ids=["nul", "half", "halves"])
def test_nul_and_half_characters_are_refused_in_every_text(serve: Serve, bad: str) -> None:
    engine = FakeEngine()
    client = serve(engine)
    num_texts = 0
    for (method, path), body in FULL.items():
        for field, changed in spoilt(body, bad):
            refused(send(client, method, path, changed), param=field)
            num_texts += 1
    assert num_texts == 32
    assert engine.asked == []


def test_nul_and_half_characters_are_refused_in_paths_and_queries(serve: Serve) -> None:
    client = serve(FakeEngine())
    for path in (
        "/v1/comparisons/a%00b/vote",
        "/v1/comparisons/a%00b/ranking/history",
        "/v1/conversations/%00",
        "/v1/models/%00",
        "/v1/conversations?before=%00",
        "/v1/demonstrations?before=%00",
        "/v1/users/me?user=%00",
    ):
        refused(client.get(path))
    refused(client.delete("/operator/users?user=ada&account=%00"))
    for path in ("/web/%00", "/docs/swagger-ui/%00", "/%00", "/web/" + "a" * 5000, "/v1/models/%ED%A0%80"):
        refused(client.get(path), 404)


def test_a_body_over_the_limit_is_refused_whole_or_in_pieces(serve: Serve) -> None:
    client = serve(FakeEngine())
    headers = {"content-type": "application/json"}
    for (method, path), full in FULL.items():
        body = json.dumps({**full, "comment": "x" * MOST_BODY_BYTES}).encode()
        pieces = [body[start : start + 65536] for start in range(0, len(body), 65536)]
        for content in (body, iter(pieces)):
            refused(
                client.request(method, path, content=content, headers=headers), 413, code="body_too_large"
            )


def test_deep_nesting_is_refused_or_ignored_where_the_field_is_unknown(serve: Serve) -> None:
    client = serve(FakeEngine())
    for depth in (300, 900, 5_000, 200_000):
        nest(client, depth)


def nest(client: httpx.Client, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    headers = {"content-type": "application/json"}
    for field in ("messages", "stop", "user"):
        content = (
            json.dumps(ask()).replace("{", f'{{"{field}": {nested}, ', 1)[:-1] + f', "{field}": {nested}}}'
        )
        refused(client.post(CHAT, content=content, headers=headers))
    unknown = client.post(CHAT, content=json.dumps(ask())[:-1] + f', "x": {nested}}}', headers=headers)
    assert unknown.status_code in (200, 400)
    refused(client.put(VOTE, content=nested, headers=headers))


def test_what_is_no_json_object_is_refused(serve: Serve) -> None:
    client = serve(FakeEngine())
    headers = {"content-type": "application/json"}
    long_number = b'{"seed": ' + b"9" * 5000 + b"}"
    for content in (b"{", b"\xff\xfe", long_number, b"\0", b"{'a': 1}"):
        refused(client.post(CHAT, content=content, headers=headers), code="invalid_json")
    for content in (b"", b"null", b"[]", b'"x"'):
        refused(client.post(CHAT, content=content, headers=headers))
    refused(client.post(CHAT, content=json.dumps(ask()), headers={"content-type": "text/plain"}))


def test_ten_thousand_messages_are_refused(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    turn = {"role": "user", "content": "x"}
    for path in (CHAT, "/v1/comparisons"):
        refused(client.post(path, json={"messages": [turn] * 10_000}), param="messages")
    refused(
        client.post("/v1/demonstrations", json={"messages": [turn] * 10_000, "content": "x"}),
        param="messages",
    )
    assert engine.asked == []
    assert client.post(CHAT, json={"messages": [turn] * MOST_MESSAGES}).status_code == 200


WRONG: dict[str, list[object]] = {
    "model": [5, None, ["ratchet"], {}],
    "messages": [
        "hi",
        [],
        {},
        None,
        [5],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "assistant", "content": "x"}],
    ],
    "comparison": ["sometimes", True, None, 1],
    "max_tokens": [-1, 0, 1.5, "5", True, -(10**30)],
    "max_completion_tokens": [-1, 0, 1.5, "5", True],
    "temperature": [-0.1, 2.1, "1", True, float("nan"), float("inf"), []],
    "top_p": [0, 1.1, "1", float("nan")],
    "stop": ["", [""], ["a"] * 5, 5, [5], {}],
    "seed": [1.5, 1 << 53, -(1 << 53), 10**30, "1", True],
    "presence_penalty": [2.1, -2.1, "0", float("-inf")],
    "frequency_penalty": [2.1, -2.1, "0", float("nan")],
    "stream": ["true", 1, "yes"],
    "stream_options": [5, "x", {"include_usage": "yes"}, {"include_usage": 1}],
    "logprobs": [1, "true"],
    "top_logprobs": [21, -1, "1", 1.5],
    "user": ["", "x" * 201, 5, []],
    "conversation": ["", "x" * 201, 5],
    "follows": ["chatcmpl-1", "", "x" * 201, 5],
    "n": [0, -1, 2, 1_000_000_000, 10**30, "1", True, 1.5],
}


def test_a_wrong_value_of_a_chat_request_is_named(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    for field, values in WRONG.items():
        for value in values:
            refused(send(client, "POST", CHAT, {**ask(), field: value}), param=field)
    assert engine.asked == []
    assert rows("SELECT count(*) FROM prompts") == [(0,)]


def test_every_field_of_a_chat_request_is_tried_with_wrong_values() -> None:
    document = create_app(Settings()).openapi()
    assert document["components"]["schemas"]["ChatRequest"]["properties"].keys() == WRONG.keys()


WRONG_ELSEWHERE: list[tuple[str, str, object, str]] = [
    ("POST", "/v1/comparisons", {**ask(), "count": 1}, "count"),
    ("POST", "/v1/comparisons", {**ask(), "count": 10**12}, "count"),
    ("POST", "/v1/comparisons", {**ask(), "temperature": 0}, "temperature"),
    ("PUT", VOTE, {"choice": "third"}, "choice"),
    ("PUT", VOTE, {"choice": 1}, "choice"),
    ("PUT", VOTE, {}, "choice"),
    ("PUT", VOTE, {"choice": "first", "comment": "x" * 4001}, "comment"),
    ("PUT", VOTE, {"choice": "first", "tags": ["t"] * 17}, "tags"),
    ("PUT", VOTE, {"choice": "first", "tags": ["x" * 65]}, "tags"),
    ("PUT", VOTE, {"choice": "first", "tags": "t"}, "tags"),
    ("PUT", RANKING, {"ranks": [1]}, "ranks"),
    ("PUT", RANKING, {"ranks": [1] * 10}, "ranks"),
    ("PUT", RANKING, {"ranks": [0, 1]}, "ranks"),
    ("PUT", RANKING, {"ranks": ["1", "2"]}, "ranks"),
    ("PUT", RANKING, {"ranks": [True, 2]}, "ranks"),
    ("POST", "/v1/demonstrations", {"content": "x"}, "messages"),
    ("POST", "/v1/demonstrations", {**ask(), "content": " \n"}, "content"),
    ("POST", "/v1/demonstrations", {**ask(), "content": "x" * 100_001}, "content"),
    ("POST", "/v1/markdown", {"texts": []}, "texts"),
    ("POST", "/v1/markdown", {"texts": ["x"] * 10}, "texts"),
    ("POST", "/v1/markdown", {"texts": ["x" * 100_001]}, "texts"),
    ("POST", "/v1/markdown", {"texts": "x"}, "texts"),
    ("GET", "/v1/comparisons/queue?limit=0", None, "limit"),
    ("PATCH", "/v1/users/me", {"compares": "no"}, "compares"),
    ("PATCH", "/v1/users/me", {"compares": 0}, "compares"),
    ("POST", "/operator/promote", {"policy": ""}, "policy"),
    ("GET", "/operator/votes?limit=0", None, "limit"),
    ("GET", "/operator/votes?commented=perhaps", None, "commented"),
    ("GET", "/operator/votes/hours?hours=169", None, "hours"),
    ("GET", "/operator/duels/0/course", None, "duel_id"),
    ("POST", "/operator/keys", {"account": "../etc"}, "account"),
    ("POST", "/operator/keys", {"account": "a", "role": "root"}, "role"),
    ("POST", "/operator/keys", {"account": "a", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
    ("POST", "/operator/keys", {"account": "a", "expires_at": "2099-01-01T00:00:00"}, "expires_at"),
    ("PUT", "/operator/replicas", {"url": "ftp://10.0.0.7", "state": "serving"}, "url"),
    ("PUT", "/operator/replicas", {"url": "http://me:secret@10.0.0.7", "state": "serving"}, "url"),
    ("PUT", "/operator/replicas", {"url": "http://10.0.0.7:99999", "state": "serving"}, "url"),
    ("PUT", "/operator/replicas", {"url": "http://10.0.0.7/?a=b", "state": "serving"}, "url"),
    ("PUT", "/operator/replicas", {"url": "http://10.0.0.7", "state": "gone"}, "state"),
    ("GET", "/v1/conversations?limit=0", None, "limit"),
    ("GET", "/v1/conversations?limit=101", None, "limit"),
    ("GET", "/v1/demonstrations?limit=x", None, "limit"),
    ("GET", "/v1/demonstrations?limit=-1", None, "limit"),
    ("GET", "/v1/users/me?user=", None, "user"),
    ("POST", "/operator/cycles", {"method": "rlhf"}, "method"),
    ("GET", "/operator/cycles/0", None, "cycle_id"),
    ("GET", "/operator/cycles/x", None, "cycle_id"),
    ("DELETE", f"/operator/keys/{1 << 63}", None, "key_id"),
    ("DELETE", "/operator/users", None, "user"),
]


def test_a_wrong_value_of_another_call_is_named(serve: Serve) -> None:
    client = serve(FakeEngine())
    for method, path, body, param in WRONG_ELSEWHERE:
        answer = client.request(method, path) if body is None else send(client, method, path, body)
        refused(answer, param=param)


def test_an_unknown_field_is_refused_or_named_whatever_its_name(serve: Serve) -> None:
    strict = serve(FakeEngine(), unknown_fields="refuse")
    for name in ("tools", "\0", "x" * 10_000):
        refused(send(strict, "POST", CHAT, {**ask(), name: 1}), code="unknown_field")
    lenient = serve(FakeEngine())
    answer = send(lenient, "POST", CHAT, {**ask(), "tools": [], "a\r\nb": 1})
    assert (answer.status_code, answer.headers["x-ratchet-ignored"]) == (200, "tools")
    for client in (strict, lenient):
        refused(send(client, "POST", CHAT, {**ask(), "\ud800": 1}))


def test_odd_headers_break_nothing(serve: Serve) -> None:
    client = serve(FakeEngine())
    for header in (b"host", b"origin", b"authorization", b"idempotency-key"):
        for value in (
            b"[",
            b"http://[",
            b"[::1",
            b"Bearer rk-[",
            b"\xe9\xff",
            b"a" * 5000,
            b"'\";--",
            b"://",
        ):
            for method, path in (("GET", "/operator/keys"), ("DELETE", VOTE), ("GET", "/v1/models")):
                answer = client.request(method, path, headers=[(header, value)])
                assert answer.status_code < 500, (header, value, answer.text)
            body = {"choice": "first"}
            answer = client.put(VOTE, json=body, headers=[(header, value)])
            assert 400 <= answer.status_code < 500, (header, value, answer.text)


def compared(client: httpx.Client, **fields: object) -> str:
    """The path to vote on a new comparison."""
    return f"/v1/comparisons/{client.post(CHAT, json=ask(comparison='always', **fields)).json()['id']}/vote"


@pytest.mark.parametrize("choices", [("first", "first"), ("first", "second")])
def test_two_votes_at_the_same_instant_are_both_taken_and_one_row(
    serve: Serve, rows: Rows, choices: tuple[str, str]
) -> None:
    client = serve(FakeEngine())
    with ThreadPoolExecutor(2) as threads:
        for number in range(1, 21):
            path, together = compared(client), Barrier(2)

            def vote(choice: str, path: str = path, together: Barrier = together) -> httpx.Response:
                together.wait()
                return client.put(path, json={"choice": choice})

            answers = list(threads.map(vote, choices))
            assert [answer.status_code for answer in answers] == [200, 200]
            assert rows("SELECT count(*) FROM votes") == [(number,)]
            events = client.get(f"{path}/history").json()["data"]
            assert [event["action"] for event in events] == ["given", "revised"][: len(set(choices))]
            assert client.get(path).json()["choice"] == events[-1]["content"]["choice"]


def test_a_comparison_of_another_user_cannot_be_told_from_none(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    path = compared(client, user="ada")
    answers = [
        client.put(place, json={"choice": "first", "user": user})
        for place, user in ((path, None), (path, "bob"), (VOTE, "ada"))
    ]
    for answer in answers:
        refused(answer, 404, param="id", code="comparison_not_found")
    assert len({answer.text for answer in answers}) == 1
    assert rows("SELECT count(*) FROM votes") == [(0,)]


def test_an_idempotency_key_used_for_another_call_is_refused_and_changes_nothing(
    serve: Serve, rows: Rows
) -> None:
    client = serve(FakeEngine(replies=("one two", "three four", "five six")))
    key = {"idempotency-key": "k1"}
    path, other = compared(client), compared(client)
    assert client.put(path, json={"choice": "first"}, headers=key).status_code == 200
    ranked = client.post("/v1/comparisons", json={**ask(), "count": 3}).json()["id"]
    for place, body in (
        (path, {"choice": "second"}),
        (path, {"choice": "first", "comment": "why"}),
        (other, {"choice": "first"}),
        (f"/v1/comparisons/{ranked}/ranking", {"ranks": [1, 2, 3]}),
    ):
        refused(
            client.put(place, json=body, headers=key),
            409,
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    demonstration = {"messages": [{"role": "user", "content": "hi"}], "content": "hello"}
    refused(client.post("/v1/demonstrations", json=demonstration, headers=key), 409)
    assert rows("SELECT choice, comment FROM votes") == [("first", None)]
    assert rows("SELECT count(*) FROM rankings") == rows("SELECT count(*) FROM demonstrations") == [(0,)]
