"""What starts a cycle, and the snapshot of votes that it learns from."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.policies import BASE
from service.settings import Settings
from service.tables import (
    Comparison,
    Cycle,
    Demonstration,
    Ranking,
    RemovedFeedback,
    Reply,
    Snapshot,
    User,
    Vote,
)
from tests.trainer.cycles.acts import (
    add_demonstrations,
    add_prompts,
    add_votes,
    request_cycle,
)
from trainer import snapshot
from trainer.__main__ import find_trigger

pytestmark = pytest.mark.database


def test_a_snapshot_that_was_changed_is_refused(settings: Settings, sessions: sessionmaker[Session]) -> None:
    add_votes(sessions, 2)
    path = settings.state / "snapshot.jsonl"
    with sessions.begin() as session:
        sha256 = snapshot.save(snapshot.take(session), path, session)
    assert [row.ranks for row in snapshot.load(path, sha256)] == [[1, 2], [2, 1]]
    path.write_text(path.read_text().replace("yes", "yep"))
    with pytest.raises(ValueError, match="sha256 differs"):
        snapshot.load(path, sha256)


def test_what_starts_a_cycle(settings: Settings, sessions: sessionmaker[Session]) -> None:
    settings = settings.model_copy(update={"cycle_votes": 10, "cycle_min_votes": 3, "cycle_hours": 2.0})
    now = datetime.now(UTC)
    later = now + timedelta(hours=3)

    def trigger(at: datetime) -> str | None:
        with sessions() as session:
            return find_trigger(session, settings, at)

    assert trigger(later) is None
    add_votes(sessions, 2)
    assert trigger(later) is None
    add_votes(sessions, 1)
    assert (trigger(now), trigger(later)) == (None, "clock")
    add_votes(sessions, 7)
    assert trigger(now) == "votes"
    request_cycle(sessions)
    assert trigger(later) is None


def test_what_a_user_had_removed_goes_from_the_snapshots_too(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 3)
    asked = add_prompts(sessions, "ann", 2)
    cycles = settings.state / "cycles"
    path = snapshot.file_of(cycles, request_cycle(sessions))
    path.parent.mkdir(parents=True)
    with sessions.begin() as session:
        taken = snapshot.take(session, prompts_per_vote=1, most_prompts=100)
        sha256 = snapshot.save(taken, path, session)
        session.execute(update(Cycle).values(snapshot_sha256=sha256, stage="rejected", ended_at=func.now()))
        session.add(RemovedFeedback(kind="vote", feedback_id=taken[1].id))
        session.add(RemovedFeedback(kind="prompt", feedback_id=asked[0]))
    for expected in (2, 0):
        with sessions.begin() as session:
            assert snapshot.scrub(session, cycles) == expected
        left = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        assert [(row["kind"], row["id"]) for row in left] == [
            ("vote", taken[0].id),
            ("vote", taken[2].id),
            ("prompt", asked[1]),
        ]


def test_a_snapshot_holds_rankings_demonstrations_and_corrections_too(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 2, choice="neither")
    with sessions.begin() as session:
        [user] = session.scalars(select(User))
        first, second = session.scalars(select(Comparison).order_by(Comparison.prompt_id))
        session.add(Ranking(comparison_id=first.id, user_id=user.id, ranks=[2, 1], tags=[]))
        reply = session.get_one(Reply, f"chatcmpl-{first.prompt_id}-0")
        for number, (corrected, corrects) in enumerate(((reply.content, reply.id), (None, None))):
            session.add(
                Demonstration(
                    id=f"dem-{number}",
                    prompt_id=second.prompt_id,
                    user_id=user.id,
                    content="perhaps",
                    corrected=corrected,
                    corrects=corrects,
                    tags=[],
                )
            )
    with sessions.begin() as session:
        taken = snapshot.take(session)
        sha256 = snapshot.save(taken, settings.state / "snapshot.jsonl", session)
    assert snapshot.load(settings.state / "snapshot.jsonl", sha256) == taken
    found = [(row.kind, row.ranks, row.replies) for row in taken]
    assert found == [
        ("vote", None, ["yes yes", "no"]),
        ("vote", None, ["no", "yes yes"]),
        ("ranking", [2, 1], ["yes yes", "no"]),
        ("demonstration", [1, 2], ["perhaps", "yes yes"]),
        ("demonstration", [1], ["perhaps"]),
    ]
    assert taken[3].policies == [None, BASE]
    assert {row.user for row in taken} == {"/ann"}


def test_a_snapshot_holds_what_else_those_asked_who_vote_the_newest_of_each_in_turn(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 1)
    of_bob = add_prompts(sessions, "bob", 1)
    of_ann = add_prompts(sessions, "ann", 8)
    add_prompts(sessions, "bob", 1, finish_reason="length")
    add_prompts(sessions, "bob", 1, finish_reason=None)
    add_prompts(sessions, "carl", 1)  # who never votes
    add_prompts(sessions, "dora", 1)  # who opted out
    add_demonstrations(sessions, 1)
    with sessions.begin() as session:
        [compared] = session.scalars(select(Comparison.id))
        for user in session.scalars(select(User).where(User.name.in_(("bob", "dora")))):
            user.compares = user.name != "dora"
            session.add(Vote(comparison_id=compared, user_id=user.id, choice="tie", tags=[]))

    def held(rows: list[snapshot.Feedback]) -> list[str]:
        return [row.id for row in rows if row.kind == "prompt"]

    with sessions.begin() as session:
        path = settings.state / "snapshot.jsonl"
        judged = snapshot.take(session)
        assert [row.kind for row in judged] == ["vote", "vote", "vote", "demonstration"]
        taken = snapshot.take(session, prompts_per_vote=2, most_prompts=100)
        assert taken[:4] == judged
        assert held(taken) == sorted([*of_bob, *of_ann[-2:]], key=int)
        assert (taken[-1].user, taken[-1].messages[0]["content"]) == ("/ann", "Why,\u20287?")
        newest = sorted([*of_bob, of_ann[-1]], key=int)
        assert held(snapshot.take(session, prompts_per_vote=4, most_prompts=3 + 2)) == newest
        assert held(snapshot.take(session, prompts_per_vote=4, most_prompts=2)) == []
        for rows in (judged, taken):
            sha256 = snapshot.save(rows, path, session)
            assert snapshot.load(path, sha256) == rows
    with sessions() as session:
        without, whole = session.scalars(
            select(Snapshot).order_by(Snapshot.sha256 != Snapshot.feedback_sha256)
        )
        assert (whole.num_votes, whole.num_feedback) == (without.num_votes, without.num_feedback) == (3, 4)
        assert whole.feedback_sha256 == without.feedback_sha256 == without.sha256 != whole.sha256
