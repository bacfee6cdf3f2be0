"""Votes, over HTTP and with a real database."""

import httpx
import pytest

from tests.service.conftest import Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database


def compare(client: httpx.Client, **fields: object) -> str:
    """The path to vote on a new comparison."""
    answer = client.post("/v1/chat/completions", json=ask(comparison="always", **fields)).json()
    return f"/v1/comparisons/{answer['comparison']['id']}/vote" if "comparison" in answer else ""


def test_a_vote_is_stored_when_the_call_returns_and_names_the_policies(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    answer = client.put(compare(client), json={"choice": "second", "comment": "warmer", "tags": ["tone"]})
    assert answer.status_code == 200
    assert answer.json()["policies"] == ["policy-000000", "policy-000000"]
    assert rows("SELECT choice, comment, tags FROM votes") == [("second", "warmer", ["tone"])]


def test_the_same_vote_twice_is_one_and_another_revises_it(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    path = compare(client)
    once, twice = (client.put(path, json={"choice": "first"}).json() for _ in range(2))
    assert once == twice
    revised = client.put(path, json={"choice": "tie"}).json()
    assert (revised["choice"], revised["created_at"]) == ("tie", once["created_at"])
    assert revised["updated_at"] > once["updated_at"]
    assert client.get(path).json() == revised
    assert rows("SELECT choice FROM votes") == [("tie",)]


def test_a_vote_can_be_taken_back(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    path = compare(client)
    client.put(path, json={"choice": "first"})
    assert [client.delete(path).status_code for _ in range(2)] == [204, 204]
    assert client.get(path).json()["error"]["code"] == "vote_not_found"
    assert rows("SELECT count(*) FROM votes") == [(0,)]


def test_only_whom_it_was_shown_to_can_vote_read_and_take_back(serve: Serve) -> None:
    client = serve(FakeEngine())
    path = compare(client, user="ada")
    for user in (None, "bob"):
        assert client.put(path, json={"choice": "first", "user": user}).status_code == 404
    assert client.put(path, json={"choice": "first", "user": "ada"}).status_code == 200
    assert client.get(path).status_code == client.delete(path).status_code == 404
    assert client.get(path, params={"user": "ada"}).json()["choice"] == "first"
    assert client.put("/v1/comparisons/cmp-nope/vote", json={"choice": "first"}).status_code == 404


def test_identical_replies_cannot_be_voted_on(serve: Serve) -> None:
    client = serve(FakeEngine(replies=("same", "same")))
    answer = client.put(compare(client), json={"choice": "first"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "replies_alike")


def test_a_comparison_with_a_failed_reply_cannot_be_voted_on(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(breaks_after=3))
    compare(client)
    [(comparison,)] = rows("SELECT id FROM comparisons")
    answer = client.put(f"/v1/comparisons/{comparison}/vote", json={"choice": "first"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "comparison_failed")


@pytest.mark.parametrize(
    "body", [{}, {"choice": "third"}, {"choice": "tie", "comment": "\0"}, {"choice": None}]
)
def test_a_bad_vote_is_a_400(serve: Serve, body: dict[str, object]) -> None:
    assert serve(FakeEngine()).put("/v1/comparisons/cmp-1/vote", json=body).status_code == 400


def test_a_commit_that_fails_is_not_answered_as_a_vote(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    path = compare(client)
    rows("CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$")
    rows(
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON votes DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION no()"
    )
    assert client.put(path, json={"choice": "first"}).status_code == 500
    assert rows("SELECT count(*) FROM votes") == [(0,)]


def test_every_change_of_a_vote_is_kept(serve: Serve) -> None:
    client = serve(FakeEngine())
    path = compare(client)
    for choice in ("first", "first", "second"):
        assert client.put(path, json={"choice": choice}).status_code == 200
    client.delete(path)
    client.delete(path)
    client.put(path, json={"choice": "tie"})
    events = client.get(f"{path}/history").json()["data"]
    assert [(event["action"], event["content"]["choice"]) for event in events] == [
        ("given", "first"),
        ("revised", "second"),
        ("undone", "second"),
        ("given", "tie"),
    ]


def test_a_vote_becomes_final(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(), vote_revision_seconds=60)
    path = compare(client)
    client.put(path, json={"choice": "first"})
    rows("UPDATE votes SET created_at = now() - interval '61 seconds'")
    assert client.put(path, json={"choice": "first"}).status_code == 200  # nothing changes
    for refused in (client.put(path, json={"choice": "second"}), client.delete(path)):
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "vote_final")
    assert rows("SELECT choice FROM votes") == [("first",)]


def test_a_late_repeat_of_a_call_does_not_undo_a_later_vote(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    path = compare(client)
    early = {"json": {"choice": "first"}, "headers": {"idempotency-key": "early"}}
    assert client.put(path, **early).status_code == 200
    client.put(path, json={"choice": "second"}, headers={"idempotency-key": "late"})
    assert client.put(path, **early).json()["choice"] == "first"  # the answer that was lost
    assert rows("SELECT choice FROM votes") == [("second",)]
    other = client.put(path, json={"choice": "tie"}, headers={"idempotency-key": "early"})
    assert other.status_code == 409
