"""What a labeler is offered to label next, and what not."""

import httpx
import pytest

from tests.service.conftest import Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
PATH = "/v1/comparisons/queue"


def vote(client: httpx.Client, text: str, choice: str, **headers: str) -> None:
    made = client.post("/v1/chat/completions", json=ask(text, comparison="always"), headers=headers)
    path = f"/v1/comparisons/{made.json()['id']}/vote"
    assert client.put(path, json={"choice": choice}, headers=headers).status_code == 200


def offered(client: httpx.Client, **headers: str) -> list[tuple[str, str]]:
    answer = client.get(PATH, headers=headers)
    assert answer.status_code == 200, answer.text
    return [(item["messages"][-1]["content"], item["choice"]) for item in answer.json()["data"]]


def test_where_neither_was_good_comes_first_then_ties_and_nothing_else(serve: Serve) -> None:
    client = serve(FakeEngine())
    assert offered(client) == []
    for text, choice in (("a", "neither"), ("b", "tie"), ("c", "first"), ("d", "neither"), ("e", "tie")):
        vote(client, text, choice)
    assert offered(client) == [("d", "neither"), ("a", "neither"), ("e", "tie"), ("b", "tie")]
    assert len(client.get(PATH, params={"limit": 2}).json()["data"]) == 2


def test_a_vote_that_was_changed_or_taken_back_no_longer_counts(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    vote(client, "a", "neither")
    [(comparison,)] = rows("SELECT comparison_id FROM votes")
    path = f"/v1/comparisons/{comparison}/vote"
    assert client.put(path, json={"choice": "second"}).status_code == 200
    assert offered(client) == []
    assert client.put(path, json={"choice": "tie"}).status_code == 200
    assert offered(client) == [("a", "tie")]
    assert client.delete(path).status_code == 204
    assert offered(client) == []


def test_only_labelers_see_it_and_only_their_own_accounts_prompts(serve: Serve) -> None:
    client = serve(FakeEngine())
    keys = {
        (account, role): {
            "authorization": "Bearer "
            + client.post("/operator/keys", json={"account": account, "role": role}).json()["key"]
        }
        for account, role in (("acme", "user"), ("acme", "labeler"), ("other", "labeler"))
    }
    vote(client, "of acme", "neither", **keys["acme", "user"])
    vote(client, "of nobody", "neither")
    assert offered(client, **keys["acme", "labeler"]) == [("of acme", "neither")]
    assert offered(client, **keys["other", "labeler"]) == []
    refused = client.get(PATH, headers=keys["acme", "user"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "needs_labeler")
