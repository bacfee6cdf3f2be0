"""Demonstrations and corrections: written, listed, deleted."""

import pytest

from tests.service.conftest import Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
PATH = "/v1/demonstrations"
PROMPT = [{"role": "user", "content": "what?"}]


def test_a_demonstration_is_stored_listed_and_deleted(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    first, second = (
        client.post(PATH, json={"messages": PROMPT, "content": text, "tags": ["t"]}).json()
        for text in ("This.", "That.")
    )
    assert (first["messages"], first["content"], first["corrects"]) == (PROMPT, "This.", None)
    page = client.get(PATH, params={"limit": 1}).json()
    assert (page["data"], page["has_more"]) == ([second], True)
    assert client.get(PATH, params={"before": second["id"]}).json()["data"] == [first]
    assert client.delete(f"{PATH}/{first['id']}").status_code == 204
    assert client.delete(f"{PATH}/{first['id']}").status_code == 404
    assert rows("SELECT count(*) FROM prompts") == [(1,)]


def test_a_correction_keeps_what_it_corrects(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    reply = client.post("/v1/chat/completions", json=ask("what?")).json()["choices"][0]["reply_id"]
    made = client.post(PATH, json={"corrects": reply, "content": "Better."}).json()
    assert (made["corrects"], made["corrected"], made["messages"]) == (reply, "one two", PROMPT)
    assert client.delete(f"{PATH}/{made['id']}").status_code == 204
    assert rows("SELECT count(*) FROM replies") == [(1,)]  # the reply stays


def test_what_says_nothing_or_corrects_nothing_is_refused(serve: Serve) -> None:
    client = serve(FakeEngine())
    reply = client.post("/v1/chat/completions", json=ask(user="ada")).json()["choices"][0]["reply_id"]
    for body, status in (
        ({"messages": PROMPT, "content": "  "}, 400),
        ({"content": "x"}, 400),
        ({"messages": PROMPT, "corrects": reply, "content": "x"}, 400),
        ({"messages": [{"role": "assistant", "content": "x"}], "content": "x"}, 400),
        ({"corrects": "chatcmpl-none", "content": "x"}, 404),
        ({"corrects": reply, "content": "x"}, 404),  # ada's
        ({"corrects": reply, "content": "x", "user": "ada"}, 201),
    ):
        assert client.post(PATH, json=body).status_code == status, body


def test_a_repeated_call_writes_once_and_another_body_is_refused(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    headers = {"idempotency-key": "one"}
    body = {"messages": PROMPT, "content": "This."}
    first, again = (client.post(PATH, json=body, headers=headers) for _ in range(2))
    assert first.json() == again.json()
    assert rows("SELECT count(*) FROM demonstrations") == [(1,)]
    other = client.post(PATH, json=body | {"content": "That."}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
