"""Conversations: what the next turn's context is, and that only their owner sees them."""

import httpx
import pytest

from tests.service.conftest import Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
CHAT, PATH = "/v1/chat/completions", "/v1/conversations"


def begin(client: httpx.Client, user: str = "ada") -> str:
    answer = client.post(PATH, json={"user": user})
    assert answer.status_code == 201
    return str(answer.json()["id"])


def say(client: httpx.Client, conversation: str, text: str, **fields: object) -> dict[str, object]:
    answer = client.post(CHAT, json=ask(text, conversation=conversation, user="ada", **fields))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def sent(engine: FakeEngine) -> list[str]:
    return [message.content for message in engine.asked[-1][1]]


def test_a_turn_goes_on_from_the_turns_before(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    conversation = begin(client)
    say(client, conversation, "hello")
    say(client, conversation, "and then?")
    say(client, conversation, "and now?")
    assert sent(engine) == ["hello", "one two", "and then?", "one two", "and now?"]


@pytest.mark.parametrize("choice", ["first", "second", "tie", None])
def test_the_next_turns_context_is_the_chosen_reply(serve: Serve, choice: str | None) -> None:
    engine = FakeEngine()
    client = serve(engine)
    conversation = begin(client)
    answer = say(client, conversation, "hello", comparison="always")
    texts = [item["message"]["content"] for item in answer["choices"]]  # type: ignore[attr-defined, index]
    if choice:
        vote = f"/v1/comparisons/{answer['id']}/vote"
        assert client.put(vote, json={"choice": choice, "user": "ada"}).status_code == 200
    say(client, conversation, "more")
    assert sent(engine) == ["hello", texts[1 if choice == "second" else 0], "more"]


def test_a_turn_that_failed_is_not_context(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    conversation = begin(client)
    say(client, conversation, "hello")
    engine.breaks_after = 1
    assert client.post(CHAT, json=ask("lost", conversation=conversation, user="ada")).status_code == 503
    engine.breaks_after = None
    say(client, conversation, "again")
    assert sent(engine) == ["hello", "one two", "again"]


def reply_id(answer: dict[str, object], index: int = 0) -> str:
    return str(answer["choices"][index]["reply_id"])  # type: ignore[index]


def current(client: httpx.Client, conversation: str) -> list[tuple[str, bool]]:
    turns = client.get(f"{PATH}/{conversation}", params={"user": "ada"}).json()["turns"]
    return [(turn["message"], turn["current"]) for turn in turns]


def test_a_turn_can_follow_an_earlier_reply_and_the_conversation_goes_on_from_there(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    conversation = begin(client)
    first = say(client, conversation, "hello")
    say(client, conversation, "and then?")
    say(client, conversation, "or what?", follows=reply_id(first))
    assert sent(engine) == ["hello", "one two", "or what?"]
    say(client, conversation, "why?")
    assert sent(engine) == ["hello", "one two", "or what?", "one two", "why?"]
    assert current(client, conversation) == [
        ("hello", True),
        ("and then?", False),
        ("or what?", True),
        ("why?", True),
    ]
    say(client, conversation, "hello", follows="")
    assert sent(engine) == ["hello"]
    assert current(client, conversation)[-2:] == [("why?", False), ("hello", True)]


def test_the_reply_that_is_followed_is_the_context_whatever_the_vote(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    conversation = begin(client)
    answer = say(client, conversation, "hello", comparison="always")
    texts = [item["message"]["content"] for item in answer["choices"]]  # type: ignore[attr-defined, index]
    say(client, conversation, "more", follows=reply_id(answer, 1))
    assert sent(engine) == ["hello", texts[1], "more"]
    assert current(client, conversation) == [("hello", True), ("more", True)]


def test_a_turn_that_failed_is_not_current(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    conversation = begin(client)
    say(client, conversation, "hello")
    engine.breaks_after = 1
    assert client.post(CHAT, json=ask("lost", conversation=conversation, user="ada")).status_code == 503
    assert current(client, conversation) == [("hello", True), ("lost", False)]


def test_only_a_reply_of_this_conversation_that_ended_well_can_be_followed(serve: Serve) -> None:
    client = serve(FakeEngine())
    conversation, other = begin(client), begin(client)
    elsewhere = reply_id(say(client, other, "hello"))
    for fields, status, code in (
        ({"conversation": conversation, "follows": elsewhere}, 404, "reply_not_found"),
        ({"conversation": conversation, "follows": "chatcmpl-0"}, 404, "reply_not_found"),
        ({"follows": elsewhere}, 400, "needs_conversation"),
    ):
        answer = client.post(CHAT, json=ask(user="ada", **fields))
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.json()["error"]["param"] == "follows"


def test_a_conversation_is_listed_read_and_deleted_by_its_owner_alone(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    first, second = begin(client), begin(client)
    begin(client)  # never used: not listed
    say(client, first, "hello")
    answer = say(client, second, "what is it?", comparison="always")
    listed = client.get(PATH, params={"user": "ada"}).json()
    assert [(row["id"], row["title"], row["turns"]) for row in listed["data"]] == [
        (second, "what is it?", 1),
        (first, "hello", 1),
    ]
    page = client.get(PATH, params={"user": "ada", "limit": 1}).json()
    assert page["has_more"]
    older = client.get(PATH, params={"user": "ada", "before": page["data"][-1]["id"]}).json()
    assert [row["id"] for row in older["data"]] == [first]
    turn = client.get(f"{PATH}/{second}", params={"user": "ada"}).json()["turns"][0]
    assert [reply["policy"] for reply in turn["replies"]] == [None, None]  # blind until the vote
    client.put(f"/v1/comparisons/{answer['id']}/vote", json={"choice": "second", "user": "ada"})
    turn = client.get(f"{PATH}/{second}", params={"user": "ada"}).json()["turns"][0]
    assert (turn["choice"], turn["replies"][0]["policy"]) == ("second", "policy-000000")
    for user in ({}, {"user": "bob"}):
        assert client.get(PATH, params=user).json()["data"] == []
        assert client.get(f"{PATH}/{second}", params=user).status_code == 404
        assert client.delete(f"{PATH}/{second}", params=user).status_code == 404
    assert client.post(CHAT, json=ask(conversation=second, user="bob")).status_code == 404
    assert client.delete(f"{PATH}/{second}", params={"user": "ada"}).status_code == 204
    assert client.get(f"{PATH}/{second}", params={"user": "ada"}).status_code == 404
    assert rows("SELECT count(*) FROM prompts") == [(1,)]
    assert rows("SELECT count(*) FROM votes") == [(0,)]
