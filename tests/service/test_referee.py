"""Duels on real PostgreSQL: who goes live, who is rejected, who is taken back, by votes alone."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.conftest import Rows, Serve, ask, publish, wait_until
from tests.service.fake_engine import FakeEngine
from tests.service.test_reconciler import make_folder

pytestmark = pytest.mark.database
BASE = "policy-000000"
NEW = "policy-000001"
POINTER = "SELECT live, previous, challenger FROM deployment"
DUELS = "SELECT kind, challenger, incumbent, outcome FROM duels ORDER BY id"
CHAT = "/v1/chat/completions"
DUELLING: dict[str, Any] = {"duel_votes": 100, "duel_share": 1.0, "watch_share": 1.0}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(logprobs={NEW: -2.0}, says={BASE: "the old answer", NEW: "something rather different"})


def begin_trial(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path, **settings: Any
) -> httpx.Client:
    client = serve(engine, **DUELLING | settings)
    publish(rows, NEW, make_folder(tmp_path / NEW))
    wait_until(lambda: rows(DUELS) == [("trial", NEW, BASE, None)])
    wait_until(lambda: is_duel(compare(client)))  # this process has seen it too
    return client


def compare(client: httpx.Client, user: str = "ada") -> dict[str, Any]:
    answer: dict[str, Any] = client.post(CHAT, json=ask(comparison="always", user=user)).json()
    return answer


def is_duel(answer: dict[str, Any]) -> bool:
    return len({choice["message"]["content"] for choice in answer["choices"]} & {
        "the old answer", "something rather different"
    }) == 2  # fmt: skip


def vote_for(client: httpx.Client, policy: str, user: str = "ada") -> dict[str, Any]:
    """Votes for what the policy said, as a user who cannot see its name would; nothing where the duel has just been decided."""
    answer = compare(client, user)
    if not is_duel(answer):
        return {}
    liked = "something rather different" if policy == NEW else "the old answer"
    said = [choice["message"]["content"] for choice in answer["choices"]]
    choice = "first" if said[0] == liked else "second"
    path = f"/v1/comparisons/{answer['comparison']['id']}/vote"
    voted = client.put(path, json={"choice": choice, "user": user})
    assert voted.status_code == 200, voted.text
    given: dict[str, Any] = voted.json()
    return given


def vote_until(client: httpx.Client, rows: Rows, policy: str, pointer: tuple[Any, ...]) -> None:
    for number in range(60):
        if rows(POINTER) == [pointer]:
            return
        vote_for(client, policy, f"user-{number % 7}")
    wait_until(lambda: rows(POINTER) == [pointer])


def test_a_duel_shows_both_policies_blind_and_the_vote_tells_which_was_which(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    orders = set()
    for _ in range(24):
        answer = compare(client)
        assert is_duel(answer)
        assert "policy-" not in json.dumps(answer)
        path = f"/v1/comparisons/{answer['comparison']['id']}/vote"
        policies = client.put(path, json={"choice": "tie", "user": "ada"}).json()["policies"]
        said = [choice["message"]["content"] for choice in answer["choices"]]
        assert policies == [NEW if text == "something rather different" else BASE for text in said]
        orders.add(tuple(policies))
    assert len(orders) == 2


def test_a_streamed_duel_tells_no_policy_either(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    answer = client.post(CHAT, json=ask(comparison="always", stream=True))
    assert "policy-" not in answer.text + str(answer.headers)
    for text in ("rather", "old"):
        assert text in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_votes_that_prove_it_better_let_it_go_live_and_then_it_is_watched(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    vote_until(client, rows, NEW, (NEW, BASE, None))
    assert rows(DUELS) == [("trial", NEW, BASE, "better"), ("watch", NEW, BASE, None)]
    [(metrics,)] = rows("SELECT metrics FROM duels WHERE kind = 'trial'")
    assert metrics["wins"] >= 10
    assert metrics["losses"] == 0
    assert metrics["evidence_better"] >= 20
    assert client.get("/operator/duels").json()[1]["outcome"] == "better"


def test_votes_that_prove_it_worse_reject_it_and_live_stays(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    vote_until(client, rows, BASE, (BASE, None, None))
    [(state, reason)] = rows("SELECT state, reason FROM policies WHERE name = %s", NEW)
    assert state == "rejected"
    assert "the votes prove it worse: 0 votes for policy-000001" in reason
    wait_until(lambda: engine.held == {BASE})


def test_votes_that_prove_nothing_end_a_trial_at_its_cap(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path, duel_votes=6)
    for number in range(6):
        vote_for(client, (NEW, BASE)[number % 2], f"user-{number}")
    wait_until(lambda: rows(POINTER) == [(BASE, None, None)])
    assert rows(DUELS) == [("trial", NEW, BASE, "undecided")]
    assert "do not prove it better" in rows("SELECT reason FROM policies WHERE name = %s", NEW)[0][0]


def test_a_trial_without_votes_ends_in_time(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    serve(engine, **DUELLING, duel_hours=0.5 / 3600)
    publish(rows, NEW, make_folder(tmp_path / NEW))
    wait_until(lambda: rows(DUELS) == [("trial", NEW, BASE, "undecided")])


def test_a_live_policy_that_loses_to_the_one_before_it_is_taken_back(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    vote_until(client, rows, NEW, (NEW, BASE, None))
    wait_until(lambda: is_duel(compare(client)))
    vote_until(client, rows, BASE, (BASE, NEW, None))
    assert rows(DUELS)[1] == ("watch", NEW, BASE, "worse")
    [(state, reason)] = rows("SELECT state, reason FROM policies WHERE name = %s", NEW)
    assert state == "rolled_back"
    assert "prove it worse" in reason
    wait_until(lambda: client.post(CHAT, json=ask()).headers.get("x-ratchet-policy") == BASE)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("finish_reason = 'length'", "its own was cut off 20 times, and the other one 0 times"),
        ("completion_tokens = 900", "its own was more than four times as long 20 times"),
        (
            "ended_at = created_at + interval '1 hour'",
            "its own took more than four times as long, and a second",
        ),
    ],
)
def test_replies_that_are_worse_side_by_side_need_no_votes(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path, fault: str, reason: str
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    made = [compare(client) for _ in range(24)]
    spoilt = [choice["reply_id"] for answer in made for choice in answer["choices"]]
    ours = rows("SELECT id FROM replies WHERE id = ANY(%s) AND policy = %s ORDER BY id LIMIT 20", spoilt, NEW)
    rows(f"UPDATE replies SET {fault} WHERE id = ANY(%s)", [reply for (reply,) in ours])
    wait_until(lambda: rows(DUELS) == [("trial", NEW, BASE, "worse")])
    assert reason in rows("SELECT reason FROM policies WHERE name = %s", NEW)[0][0]
    assert rows(POINTER) == [(BASE, None, None)]


def test_one_user_counts_only_so_often(serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path) -> None:
    client = begin_trial(serve, rows, engine, tmp_path, duel_votes_per_user=3)
    for _ in range(20):
        vote_for(client, NEW, "zealot")
    wait_until(lambda: rows("SELECT metrics->>'wins' FROM duels") == [("3",)])
    assert rows(POINTER) == [(BASE, None, NEW)]


def test_a_vote_that_is_taken_back_counts_no_more(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    vote = vote_for(client, NEW)
    wait_until(lambda: rows("SELECT metrics->>'wins' FROM duels") == [("1",)])
    client.delete(f"/v1/comparisons/{vote['comparison_id']}/vote?user=ada")
    wait_until(lambda: rows("SELECT metrics->>'wins' FROM duels") == [("0",)])


def test_a_vote_counts_as_it_was_before_its_answer_named_the_policies(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    vote = vote_for(client, NEW)
    other = {"first": "second", "second": "first"}[vote["choice"]]
    path = f"/v1/comparisons/{vote['comparison_id']}/vote"
    assert client.put(path, json={"choice": other, "user": "ada"}).json()["choice"] == other
    vote_for(client, NEW)
    wait_until(lambda: rows("SELECT metrics->>'wins', metrics->>'losses' FROM duels") == [("2", "0")])


@pytest.mark.parametrize(("voters", "per_user"), [(49, 1 << 30), (50, 1)])
def test_of_many_users_one_vote_each_counts_and_of_a_few_all(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path, voters: int, per_user: int
) -> None:
    client = serve(engine, **DUELLING)
    for number in range(voters):
        answer = compare(client, f"user-{number}")
        path = f"/v1/comparisons/{answer['comparison']['id']}/vote"
        rows("UPDATE replies SET content = id")  # two of one policy say the same here
        assert client.put(path, json={"choice": "tie", "user": f"user-{number}"}).status_code == 200
    publish(rows, NEW, make_folder(tmp_path / NEW))
    wait_until(lambda: rows("SELECT votes_per_user FROM duels") == [(per_user,)])


def test_an_operator_ends_a_trial_either_way_and_it_is_on_record(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    assert client.post("/operator/promote", json={"reason": "looks good"}).json()["live"] == NEW
    wait_until(lambda: rows(DUELS)[0] == ("trial", NEW, BASE, "stopped"))
    assert rows(DUELS)[1] == ("watch", NEW, BASE, None)  # forced live, it may still lose
    assert client.post("/operator/rollback").json()["live"] == BASE
    engine.logprobs["policy-000002"] = -2.0
    publish(rows, "policy-000002", make_folder(tmp_path / "policy-000002"))
    wait_until(lambda: rows(DUELS)[-1] == ("trial", "policy-000002", BASE, None))
    assert client.post("/operator/reject", json={"reason": "no"}).json()["challenger"] is None
    actions = [
        (row["action"], row["subject"], row["reason"]) for row in client.get("/operator/actions").json()
    ]
    assert actions == [
        ("reject", "policy-000002", "no"),
        ("rollback", BASE, None),
        ("promote", NEW, "looks good"),
    ]
    for call in ("promote", "reject"):
        assert client.post(f"/operator/{call}").json()["error"]["code"] == "no_challenger"


def test_a_trial_begins_anew_when_live_changes_under_it(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    vote_until(client, rows, NEW, (NEW, BASE, None))
    engine.logprobs["policy-000002"] = -2.0
    publish(rows, "policy-000002", make_folder(tmp_path / "policy-000002"), NEW)
    wait_until(lambda: rows(DUELS)[-1] == ("trial", "policy-000002", NEW, None))
    client.post("/operator/rollback")
    wait_until(
        lambda: (
            rows(DUELS)[-2:]
            == [("trial", "policy-000002", NEW, "stopped"), ("trial", "policy-000002", BASE, None)]
        )
    )


def test_an_engine_that_breaks_off_one_of_the_two_ends_both_and_nothing_is_voted_on(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path
) -> None:
    client = begin_trial(serve, rows, engine, tmp_path)
    engine.breaks_after = 1
    answer = client.post(CHAT, json=ask(comparison="always", user="eve"))
    assert answer.status_code == 503
    stored = rows(
        "SELECT policy, finish_reason FROM replies JOIN prompts ON prompts.id = prompt_id"
        " JOIN users ON users.id = user_id WHERE users.name = 'eve' ORDER BY policy"
    )
    assert stored == [(BASE, "error"), (NEW, "error")]
