"""Removal: nothing of a user is left, and who learnt from them is said."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.database import sync_engine, sync_sessions
from service.settings import Settings
from service.tables import Table
from tests.service.conftest import Rows, Serve, ask, wait_until
from tests.service.fake_engine import FakeEngine
from trainer import snapshot

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


def test_what_is_taken_back_or_deleted_goes_from_snapshots(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(replies=("one two", "three four")))
    conversation = client.post("/v1/conversations", json={}).json()["id"]
    body = ask("so?", comparison="always", conversation=conversation)
    compared = client.post(CHAT, json=body).json()
    path = f"/v1/comparisons/{compared['id']}/vote"
    assert client.put(path, json={"choice": "first"}).status_code == 200
    written = client.post("/v1/demonstrations", json={"messages": body["messages"], "content": "this"}).json()
    held = {
        ("vote", str(rows("SELECT id FROM votes")[0][0])),
        ("demonstration", written["id"]),
        ("prompt", str(rows("SELECT id FROM prompts WHERE conversation_id IS NOT NULL")[0][0])),
    }
    rows("INSERT INTO snapshots (sha256, num_votes, num_feedback, feedback_sha256) VALUES ('ab', 1, 2, 'ab')")
    for kind, number in held:
        rows("INSERT INTO snapshot_feedback VALUES ('ab', %s, %s)", kind, number)
    for gone in (path, f"/v1/demonstrations/{written['id']}", f"/v1/conversations/{conversation}"):
        assert client.delete(gone).status_code == 204
    assert set(rows("SELECT kind, feedback_id FROM removed_feedback")) == held


def test_what_is_removed_while_a_snapshot_is_taken_goes_from_it_too(
    serve: Serve, rows: Rows, database: Settings, tmp_path: Path
) -> None:
    client = serve(FakeEngine(replies=("one two", "three four")))
    compared = client.post(CHAT, json=ask("so?", comparison="always", user="judy")).json()
    path = f"/v1/comparisons/{compared['id']}/vote"
    assert client.put(path, json={"choice": "first", "user": "judy"}).status_code == 200
    engine = sync_engine(database)
    with ThreadPoolExecutor(1) as pool:
        with sync_sessions(engine).begin() as session:
            taken = snapshot.take(session)
            removal = pool.submit(client.delete, "/v1/users/me", params={"user": "judy"})
            wait_until(
                lambda: (
                    rows("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
                    == [(1,)]
                )
            )
            snapshot.save(taken, tmp_path / "snapshot.jsonl", session)
        assert removal.result().status_code == 200
    engine.dispose()
    assert rows("SELECT kind, feedback_id FROM removed_feedback") == [("vote", taken[0].id)]
    assert rows("SELECT count(*) FROM votes") == [(0,)]
