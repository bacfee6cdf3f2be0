"""What the operator's page is drawn from."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.duel import find_interval
from tests.service.conftest import Rows, Serve, ask, wait_until
from tests.service.fake_engine import FakeEngine
from tests.service.history import (
    ASKED,
    BASE,
    DUELS,
    NUM_VOTES,
    ONE,
    RULES,
    SAID,
    THREE,
    TWO,
    Given,
    held,
    write_history,
    write_votes,
)

pytestmark = pytest.mark.database


def served(serve: Serve, rows: Rows, folder: Path, **settings: Any) -> httpx.Client:
    """A service with a day's history, its three policies loaded."""
    write_history(rows, folder)
    engine = FakeEngine(logprobs=dict.fromkeys((ONE, TWO, THREE), -2.0))
    client = serve(engine, **{"duel_votes": 100} | settings)
    wait_until(lambda: held(client) == [BASE, ONE, TWO, THREE])
    return client


def test_the_overview_tells_what_answers_what_is_on_trial_and_what_was_learnt(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    found = served(serve, rows, tmp_path, cycle_votes=15).get("/operator/overview").json()
    pointer = found["deployment"]
    assert (pointer["live"], pointer["challenger"], pointer["previous"]) == (TWO, THREE, ONE)
    assert (found["engines"]["replicas"], found["engines"]["healthy"]) == (1, 1)
    assert (found["votes"], found["new_votes"], found["cycle_votes"]) == (NUM_VOTES, 15, 15)
    assert [policy["name"] for policy in found["policies"]] == [THREE, TWO, ONE, BASE]
    assert [(policy["name"], policy["votes"]) for policy in found["line"]] == [(TWO, 240), (ONE, 120), (BASE, None)]  # fmt: skip
    newest, failed, *_ = found["cycles"]
    assert (newest["stage"], newest["policy"], newest["votes"]) == ("duel", THREE, 360)
    assert newest["accuracy"]["share"] == pytest.approx(0.81)
    assert (newest["kept"]["number"], newest["progress"]["total"]) == (24, 30)
    assert failed["kept"] is None
    assert [duel["kind"] for duel in found["duels"]] == ["trial", "watch", "trial", "watch", "trial"]
    assert found["actions"][0]["reason"] == "Enough new votes, and I want to see it."


def test_a_new_service_has_an_overview_too(serve: Serve) -> None:
    found = serve(FakeEngine()).get("/operator/overview").json()
    assert found["deployment"]["live"] == BASE
    assert [policy["name"] for policy in found["line"]] == [BASE]
    assert (found["votes"], found["new_votes"]) == (0, 0)
    assert found["cycles"] == found["duels"] == found["actions"] == []


def test_new_votes_are_those_since_the_last_cycle_began(serve: Serve, rows: Rows, tmp_path: Path) -> None:
    client = served(serve, rows, tmp_path)
    [(since,)] = rows(
        "SELECT count(*) FROM votes WHERE created_at > (SELECT created_at FROM cycles WHERE id = 5)"
    )
    assert client.get("/operator/overview").json()["new_votes"] == since > 0


def test_a_duel_is_told_vote_by_vote_with_what_the_votes_leave_open(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    client = served(serve, rows, tmp_path)
    found = client.get("/operator/duels/3/course").json()
    fought = DUELS[2]
    points = found["points"]
    assert len(points) == 38  # 75 votes, every second one
    assert [point["at"] for point in points] == sorted(point["at"] for point in points)
    counted = [point["wins"] + point["losses"] + point["ties"] for point in points]
    assert counted == list(range(1, 76, 2))
    last = points[-1]
    assert (last["wins"], last["losses"], last["ties"]) == (44, 22, 9)
    interval = find_interval(fought.tally, RULES)
    assert (last["low"], last["high"]) == (interval.low, interval.high)
    assert found["duel"]["challenger"] == TWO
    assert client.get("/operator/duels/99/course").status_code == 404


def test_a_vote_that_was_revised_counts_in_the_course_as_it_was_first_given(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    client = served(serve, rows, tmp_path)
    [(comparison, user)] = rows(
        "SELECT comparison_id, user_id FROM votes WHERE comparison_id LIKE 'cmp-5-%%' ORDER BY created_at LIMIT 1"
    )
    rows(
        "INSERT INTO feedback_events (comparison_id, user_id, kind, action, content) "
        "VALUES (%s, %s, 'vote', 'given', '{\"choice\": \"tie\"}')", comparison, user,
    )  # fmt: skip
    first = client.get("/operator/duels/5/course").json()["points"][0]
    assert (first["wins"], first["losses"], first["ties"]) == (0, 0, 1)


def test_samples_hold_what_each_policy_answered_to_the_same_prompt(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    found = served(serve, rows, tmp_path).get("/operator/samples").json()
    assert [sample["prompt"] for sample in found] == ASKED
    lemon = {reply["policy"]: reply["content"] for reply in found[0]["replies"]}
    assert lemon == {policy: SAID[policy][0] for policy in (BASE, ONE, TWO, THREE)} | {
        "cycle 2, refused": SAID[ONE][0]
    }


def test_votes_are_counted_by_the_hour_with_sides_ties_and_time(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    client = served(serve, rows, tmp_path)
    found = client.get("/operator/votes/hours?hours=48").json()
    assert found["complete"]
    hours = found["hours"]
    assert [hour["hour"] for hour in hours] == sorted(hour["hour"] for hour in hours)
    for choice in ("first", "second", "tie", "neither"):
        [(stored,)] = rows("SELECT count(*) FROM votes WHERE choice = %s", choice)
        assert sum(hour[choice] for hour in hours) == stored > 0
    assert all(4 <= hour["seconds"] <= 18 for hour in hours)
    assert found["first_low"] < 0.5 < found["first_high"]
    recent = client.get("/operator/votes/hours?hours=1").json()["hours"]
    assert 0 < sum(hour["first"] + hour["second"] for hour in recent) < 20


def test_the_median_time_to_vote_is_a_median_and_imports_are_left_out(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    client.post("/v1/chat/completions", json=ask(user="ada"))
    [(ada,)] = rows("SELECT id FROM users WHERE name = 'ada'")
    then = datetime.now(UTC) - timedelta(minutes=1)
    hour = then.replace(minute=0, second=0, microsecond=0)
    replies = [(BASE, "one"), (BASE, "two")]
    votes = [
        Given(str(seconds), "hi", replies, "first", hour, hour + timedelta(seconds=seconds), user=ada)
        for seconds in (2, 3, 40)
    ]
    write_votes(rows, [*votes, Given("imported", "hi", replies, "second", hour, hour, user=ada)])
    [(number,)] = rows(
        "INSERT INTO imports (name, format, sha256, num_rows, num_new) VALUES ('a', 'votes', 'b', 1, 1) RETURNING id"
    )
    rows("UPDATE comparisons SET import_id = %s WHERE id = 'cmp-imported'", number)
    [counted] = client.get("/operator/votes/hours?hours=2").json()["hours"]
    assert (counted["first"], counted["second"], counted["seconds"]) == (3, 0, 3.0)


def test_a_side_bias_shows_in_the_interval(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(replies=("one two", "three four")))
    for _ in range(20):
        shown = client.post("/v1/chat/completions", json=ask(comparison="always", user="ada")).json()
        client.put(
            f"/v1/comparisons/{shown['comparison']['id']}/vote", json={"choice": "first", "user": "ada"}
        )
    found = client.get("/operator/votes/hours").json()
    assert found["first_low"] > 0.5


def test_the_newest_votes_come_with_what_they_were_on(serve: Serve, rows: Rows, tmp_path: Path) -> None:
    client = served(serve, rows, tmp_path)
    votes = client.get("/operator/votes?limit=7").json()
    assert len(votes) == 7
    assert [vote["created_at"] for vote in votes] == sorted((vote["created_at"] for vote in votes), reverse=True)  # fmt: skip
    question = ASKED.index(votes[0]["prompt"])
    assert {reply["policy"]: reply["content"] for reply in votes[0]["replies"]} == {
        policy: SAID[policy][question] for policy in (TWO, THREE)
    }
    commented = client.get("/operator/votes?commented=true&limit=100").json()
    [(stored,)] = rows("SELECT count(*) FROM votes WHERE comment IS NOT NULL")
    assert len(commented) == stored
    assert {vote["comment"] for vote in commented} == {"I like this one better, it is warmer."}


def test_a_move_meant_for_another_policy_is_refused_and_changes_nothing(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    client = served(serve, rows, tmp_path)
    pointer = rows("SELECT live, previous, challenger FROM deployment")
    for move in ("promote", "reject", "rollback"):
        answer = client.post(f"/operator/{move}", json={"policy": BASE})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "changed_meanwhile")
    assert rows("SELECT live, previous, challenger FROM deployment") == pointer
    assert client.post("/operator/rollback", json={"policy": ONE}).json()["live"] == ONE


def test_none_of_it_is_for_users(serve: Serve) -> None:
    client = serve(FakeEngine())
    key = client.post("/operator/keys", json={"account": "acme", "role": "labeler"}).json()["key"]
    for path in ("overview", "samples", "votes", "votes/hours", "duels/1/course"):
        answer = client.get(f"/operator/{path}", headers={"authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "needs_operator")
