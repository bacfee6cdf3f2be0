"""From a reply to the votes behind it, and back, on real PostgreSQL."""

from typing import Any

import httpx
import pytest

from tests.service.conftest import Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
BASE = "policy-000000"


def learn(rows: Rows, number: int, parent: str, votes: list[int]) -> str:
    """What the service and the trainer would have written of a cycle that learnt from these votes."""
    name, sha256 = f"policy-{number:06d}", f"{number:064x}"
    rows(
        "INSERT INTO snapshots (sha256, num_votes, num_feedback, feedback_sha256) VALUES (%s, %s, %s, %s)",
        sha256,
        len(votes),
        len(votes),
        sha256,
    )
    for vote in votes:
        rows("INSERT INTO snapshot_feedback VALUES (%s, 'vote', %s)", sha256, str(vote))
    rows(
        "INSERT INTO policies (name, parent, path, state, manifest) VALUES (%s, %s, '', 'verified', '{}')",
        name,
        parent,
    )
    rows(
        "INSERT INTO cycles (trigger, stage, snapshot_sha256, policy) VALUES ('votes', 'promoted', %s, %s)",
        sha256,
        name,
    )
    rows(
        "UPDATE policies SET cycle_id = (SELECT id FROM cycles WHERE policy = %s) WHERE name = %s", name, name
    )
    return name


def compare(client: httpx.Client) -> dict[str, Any]:
    answer: dict[str, Any] = client.post(
        "/v1/chat/completions", json=ask(comparison="always", user="ada")
    ).json()
    return answer


def test_the_way_from_a_vote_to_every_policy_that_learnt_from_it_and_back(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    early, late = compare(client), compare(client)
    for answer in (early, late):
        path = f"/v1/comparisons/{answer['comparison']['id']}/vote"
        assert client.put(path, json={"choice": "first", "user": "ada"}).status_code == 200
    [(first,), (second,)] = rows("SELECT id FROM votes ORDER BY id")
    one = learn(rows, 1, BASE, [first])
    two = learn(rows, 2, one, [second])  # the first vote is in its parent alone
    aside = learn(rows, 3, BASE, [second])

    forward = client.get(f"/operator/comparisons/{early['comparison']['id']}/lineage").json()
    assert forward["feedback"] == [
        {
            "kind": "vote",
            "id": first,
            "policies": [{"name": one, "directly": True}, {"name": two, "directly": False}],
        }
    ]
    forward = client.get(f"/operator/comparisons/{late['comparison']['id']}/lineage").json()
    assert [learner["name"] for learner in forward["feedback"][0]["policies"]] == [two, aside]

    reply = early["choices"][0]["reply_id"]
    rows("UPDATE replies SET policy = %s WHERE id = %s", two, reply)
    back = client.get(f"/operator/replies/{reply}/lineage").json()["policies"]
    assert [(origin["name"], origin["parent"], origin["num_feedback"]) for origin in back] == [
        (two, one, 1),
        (one, BASE, 1),
        (BASE, None, 0),
    ]
    assert back[0]["snapshot_sha256"] == f"{2:064x}"


def test_a_vote_that_nothing_learnt_from_yet_has_no_policies(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    answer = compare(client)
    path = f"/operator/comparisons/{answer['comparison']['id']}/lineage"
    assert client.get(path).json()["feedback"] == []
    client.put(f"/v1/comparisons/{answer['comparison']['id']}/vote", json={"choice": "second", "user": "ada"})
    assert client.get(path).json()["feedback"][0]["policies"] == []


def test_what_does_not_exist_has_no_lineage(serve: Serve) -> None:
    client = serve(FakeEngine())
    assert client.get("/operator/replies/chatcmpl-none/lineage").json()["error"]["code"] == "reply_not_found"
    assert (
        client.get("/operator/comparisons/cmp-none/lineage").json()["error"]["code"] == "comparison_not_found"
    )
