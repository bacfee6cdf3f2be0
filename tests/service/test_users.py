"""Removal: nothing of a user is left, and who learnt from them is said."""

import pytest

from service.tables import Table
from tests.service.conftest import Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
CHAT = "/v1/chat/completions"


def test_a_user_sees_who_they_are(serve: Serve) -> None:
    client = serve(FakeEngine())
    assert client.get("/v1/users/me").json() == {
        "account": "",
        "user": "anonymous",
        "role": "operator",
        "compares": True,
    }


def test_removal_leaves_nothing_of_the_user_and_all_of_the_others(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(replies=("one two", "three four", "five six")))
    for user in ("judy", "bob"):
        conversation = client.post("/v1/conversations", json={"user": user}).json()["id"]
        body = ask(f"secret of {user}", comparison="always", user=user, conversation=conversation)
        compared = client.post(CHAT, json=body).json()
        vote = {"choice": "first", "user": user, "comment": f"says {user}"}
        path = f"/v1/comparisons/{compared['id']}/vote"
        assert client.put(path, json=vote, headers={"idempotency-key": "k"}).status_code == 200
        ranked = client.post(
            "/v1/comparisons", json={"messages": body["messages"], "count": 3, "user": user}
        ).json()
        rank = {"ranks": [1, 2, 3], "user": user}
        assert client.put(f"/v1/comparisons/{ranked['id']}/ranking", json=rank).status_code == 200
        corrects = compared["choices"][0]["reply_id"]
        for demonstration in ({"corrects": corrects}, {"messages": body["messages"]}):
            written = client.post(
                "/v1/demonstrations", json={**demonstration, "content": f"by {user}", "user": user}
            )
            assert written.status_code == 201
    [(vote_id,)] = rows("SELECT v.id FROM votes v JOIN users u ON u.id = v.user_id WHERE u.name = 'judy'")
    rows("INSERT INTO snapshots (sha256, num_votes, num_feedback, feedback_sha256) VALUES ('ab', 1, 1, 'ab')")
    rows("INSERT INTO snapshot_feedback VALUES ('ab', 'vote', %s)", str(vote_id))
    prompts = dict(
        rows("SELECT u.name, min(p.id)::text FROM prompts p JOIN users u ON u.id = p.user_id GROUP BY 1")
    )
    for name in ("judy", "bob"):
        rows("INSERT INTO snapshot_feedback VALUES ('ab', 'prompt', %s)", prompts[name])
    rows("INSERT INTO policies (name, path, state, manifest) VALUES ('policy-000001', 'p', 'verified', '{}')")
    rows(
        "INSERT INTO cycles (trigger, stage, snapshot_sha256, policy) VALUES ('votes', 'promoted', 'ab', 'policy-000001')"
    )
    removed = client.delete("/v1/users/me", params={"user": "judy"})
    assert removed.json() == {"prompts": 3, "votes": 1, "policies": ["policy-000001"]}
    assert sorted(rows("SELECT kind, feedback_id FROM removed_feedback")) == [
        ("prompt", prompts["judy"]),
        ("vote", str(vote_id)),
    ]  # for the trainer to take from its files
    for table in Table.metadata.sorted_tables:
        stored = str(rows(f"SELECT t::text FROM {table.name} t"))
        assert "judy" not in stored, table.name  # no hexadecimal id can hold a "j"
    assert rows("SELECT count(*) FROM votes") == [(1,)]
    assert rows("SELECT count(*) FROM demonstrations") == [(2,)]
    assert client.delete("/v1/users/me", params={"user": "judy"}).status_code == 404
    again = client.delete("/operator/users", params={"user": "bob"})
    assert again.json() == {"prompts": 3, "votes": 1, "policies": ["policy-000001"]}
    for table in ("prompts", "replies", "users", "votes", "feedback_events", "conversations"):
        assert rows(f"SELECT count(*) FROM {table}") == [(0,)], table
