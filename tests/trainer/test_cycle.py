"""A whole cycle on a real PostgreSQL with a tiny model, and how cycles begin, end badly, and are taken up again."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.database import sync_engine, sync_sessions
from service.policies import BASE, ensure_base, read_folder
from service.settings import Settings
from service.tables import (
    Comparison,
    ComparisonReply,
    Cycle,
    Demonstration,
    Deployment,
    Policy,
    Prompt,
    Ranking,
    RemovedFeedback,
    Reply,
    Snapshot,
    SnapshotFeedback,
    User,
    Vote,
)
from tests.tiny_model import make_model
from trainer import cycle, gate, snapshot
from trainer.__main__ import find_trigger

pytestmark = pytest.mark.database
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(database: Settings) -> Settings:
    small = {"ppo_iterations": 3, "ppo_rollouts": 8, "max_reply_tokens": 8, "lora_rank": 4}
    return database.model_copy(update=small)


@pytest.fixture
def sessions(settings: Settings, base: Path) -> sessionmaker[Session]:
    made = sync_sessions(sync_engine(settings))
    with made.begin() as session:
        ensure_base(session, str(base))
    return made


def add_votes(sessions: sessionmaker[Session], count: int, choice: str | None = None) -> None:
    """Votes by one user who likes "yes" and dislikes "no", shown in either order."""
    with sessions.begin() as session:
        user = session.scalar(select(User)) or User(name="ann")
        session.add(user)
        session.flush()
        for _ in range(count):
            prompt = Prompt(user_id=user.id, messages=[{"role": "user", "content": "Is it so?"}])
            session.add(prompt)
            session.flush()
            number = prompt.id
            prompt.messages = [{"role": "user", "content": f"Is it so, {number}?"}]
            session.add(
                Comparison(
                    id=f"cmp-{number}", prompt_id=number, user_id=user.id, reason="always", propensity=1.0
                )
            )
            texts = ["yes yes", "no"] if number % 2 else ["no", "yes yes"]
            for position, text in enumerate(texts):
                reply_id = f"chatcmpl-{number}-{position}"
                session.add(
                    Reply(
                        id=reply_id,
                        prompt_id=number,
                        policy=BASE,
                        sampling={},
                        content=text,
                        finish_reason="stop",
                    )
                )
                session.flush()
                session.add(
                    ComparisonReply(comparison_id=f"cmp-{number}", position=position, reply_id=reply_id)
                )
            vote = choice or ("first" if number % 2 else "second")
            session.add(Vote(comparison_id=f"cmp-{number}", user_id=user.id, choice=vote, tags=[]))


def request_cycle(sessions: sessionmaker[Session]) -> int:
    with sessions.begin() as session:
        row = Cycle(trigger="operator", stage="requested")
        session.add(row)
        session.flush()
        return row.id


def run(settings: Settings, sessions: sessionmaker[Session], cycle_id: int) -> Cycle:
    cycle.run_cycle(settings, sessions, cycle_id, QUIET)
    with sessions() as session:
        return session.get_one(Cycle, cycle_id)


def accept_challengers(sessions: sessionmaker[Session]) -> threading.Thread:
    """Stands in for the service: verifies the next challenger and flips the pointer."""

    def watch() -> None:
        for _ in range(600):
            time.sleep(0.1)
            with sessions.begin() as session:
                deployment = session.get_one(Deployment, 1)
                if deployment.challenger is not None:
                    session.get_one(Policy, deployment.challenger).state = "verified"
                    deployment.previous, deployment.live = deployment.live, deployment.challenger
                    deployment.challenger = None
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.usefixtures("_open_gate")
def test_votes_become_a_live_policy_with_its_whole_lineage(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 40)
    service = accept_challengers(sessions)
    ended = run(settings, sessions, request_cycle(sessions))
    service.join()
    assert (ended.stage, ended.reason) == ("promoted", "policy-000001 is live.")
    with sessions() as session:
        policy = session.get_one(Policy, "policy-000001")
        assert session.get_one(Deployment, 1).live == policy.name
        taken = session.get_one(Snapshot, ended.snapshot_sha256)
        learnt_from = select(SnapshotFeedback.feedback_id).where(SnapshotFeedback.sha256 == taken.sha256)
        assert set(session.scalars(learnt_from)) == set(map(str, session.scalars(select(Vote.id))))
    manifest = read_folder(policy.name, Path(policy.path))  # READY, and every sha256
    assert manifest.probe
    kept = json.loads((Path(policy.path) / "manifest.json").read_text())
    assert (kept["parent"], kept["anchor"], kept["snapshot"]) == (BASE, BASE, taken.sha256)
    assert ended.metrics["reward_model"]["accuracy"]["share"] == 1.0
    assert len(ended.metrics["training"]["iterations"]) == 3
    folder = settings.state / "cycles" / f"{ended.id:06d}"
    assert "Cycle 1: promoted" in (folder / "report.html").read_text()
    assert list((folder / "tensorboard").glob("events*"))


@pytest.mark.usefixtures("_open_gate")
@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_a_policy_can_be_learnt_by_trl_from_the_votes_directly(
    method: str, settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.preference_methods.choose_kept", lambda iterations: len(iterations) - 1)
    add_votes(sessions, 40)
    service = accept_challengers(sessions)
    ended = run(settings.model_copy(update={"method": method}), sessions, request_cycle(sessions))
    service.join()
    assert (ended.stage, ended.metrics["training"]["method"]) == ("promoted", method)
    with sessions() as session:
        assert session.get_one(Policy, "policy-000001").manifest["settings"]["method"] == method


@pytest.mark.usefixtures("_open_gate")
def test_the_next_cycle_starts_from_the_live_policy(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 30)
    for parent in (BASE, "policy-000001"):
        service = accept_challengers(sessions)
        ended = run(settings, sessions, request_cycle(sessions))
        service.join()
        with sessions() as session:
            assert session.get_one(Policy, ended.policy).parent == parent


@pytest.mark.parametrize(
    ("count", "choice", "reason"),
    [
        (0, None, "0 votes prefer one reply"),
        (1, None, "1 votes"),
        (40, "tie", "0 votes"),
        (40, "neither", "0 votes"),
    ],
)
def test_too_little_to_learn_from_ends_the_cycle_with_a_reason(
    settings: Settings, sessions: sessionmaker[Session], count: int, choice: str | None, reason: str
) -> None:
    add_votes(sessions, count, choice)
    ended = run(settings, sessions, request_cycle(sessions))
    assert ended.stage == "failed"
    assert reason in (ended.reason or "")
    assert ended.ended_at is not None
    assert not list(settings.state.glob("policies/*"))


def test_votes_on_one_prompt_alone_cannot_be_judged(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 20)
    with sessions.begin() as session:
        for prompt in session.scalars(select(Prompt)):
            prompt.messages = [{"role": "user", "content": "Is it so?"}]
    ended = run(settings, sessions, request_cycle(sessions))
    assert (ended.stage, ended.reason) == (
        "failed",
        "The votes are on 1 prompts: too few to hold some out and learn from the rest.",
    )


def test_a_policy_that_the_gate_refuses_is_not_published(
    settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = gate.Check("guard", 0.5, 0.6, False, "")
    monkeypatch.setattr(gate, "decide", lambda *_, **__: gate.Verdict([failing]))
    monkeypatch.setattr("trainer.ppo.choose_kept", lambda iterations: 2)
    add_votes(sessions, 30)
    ended = run(settings, sessions, request_cycle(sessions))
    assert (ended.stage, ended.reason) == ("rejected", "The gate refused it: guard 0.500 (needs 0.600).")
    with sessions() as session:
        assert session.get_one(Deployment, 1).challenger is None


@pytest.mark.usefixtures("_open_gate")
def test_a_cycle_that_was_cut_off_goes_on_from_its_own_snapshot(
    settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_votes(sessions, 30)
    cycle_id = request_cycle(sessions)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("trainer.ppo.PPO.iterate", die)
        with pytest.raises(KeyboardInterrupt):
            cycle.run_cycle(settings, sessions, cycle_id, QUIET)
    add_votes(sessions, 5)
    service = accept_challengers(sessions)
    ended = run(settings, sessions, cycle_id)
    service.join()
    assert ended.stage == "promoted"
    assert ended.metrics["snapshot"]["votes"] == 30


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
    cycles = settings.state / "cycles"
    path = snapshot.file_of(cycles, request_cycle(sessions))
    path.parent.mkdir(parents=True)
    with sessions.begin() as session:
        taken = snapshot.take(session)
        sha256 = snapshot.save(taken, path, session)
        session.execute(update(Cycle).values(snapshot_sha256=sha256, stage="rejected", ended_at=func.now()))
        session.add(RemovedFeedback(kind="vote", feedback_id=taken[1].id))
    for expected in (1, 0):
        with sessions.begin() as session:
            assert snapshot.scrub(session, cycles) == expected
        left = [json.loads(line)["id"] for line in path.read_text().splitlines()]
        assert left == [taken[0].id, taken[2].id]


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
