"""A whole cycle on a real PostgreSQL with a tiny model, and how cycles begin, end badly, and are taken up again."""

import errno
import json
import math
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sqlalchemy import delete, func, select, update
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
    Duel,
    Policy,
    Prompt,
    Ranking,
    RemovedFeedback,
    ReplicaRow,
    Reply,
    Snapshot,
    SnapshotFeedback,
    User,
    Vote,
)
from tests.tiny_model import make_model
from trainer import cycle, gate, snapshot
from trainer.__main__ import find_trigger, tick
from trainer.fleet_rollouts import FleetSampler
from trainer.iterations import Iteration
from trainer.models import Batch, Roles
from trainer.ppo import PPO
from trainer.team import Parted, Team

pytestmark = pytest.mark.database
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few answers show how a cycle goes; and drawing charts takes a third of it."""
    monkeypatch.setattr(gate, "NUM_ANSWERS", 32)
    if "_with_charts" not in request.fixturenames:
        monkeypatch.setattr("trainer.report._plot", lambda *_: "")


@pytest.fixture
def _with_charts() -> None:
    """Asked for by the test that looks at the report."""


@pytest.fixture
def settings(database: Settings) -> Settings:
    small = {"ppo_iterations": 3, "ppo_rollouts": 8, "max_reply_tokens": 8, "lora_rank": 4}
    return database.model_copy(update=small)


@pytest.fixture
def full(settings: Settings) -> Settings:
    """All weights are trained."""
    return settings.model_copy(update={"tuning": "full", "delivery": "merged"})


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


def add_demonstrations(sessions: sessionmaker[Session], count: int) -> None:
    with sessions.begin() as session:
        user = session.scalar(select(User)) or User(name="ann")
        session.add(user)
        session.flush()
        for number in range(count):
            prompt = Prompt(
                user_id=user.id, messages=[{"role": "user", "content": f"And is it {number % 8}?"}]
            )
            session.add(prompt)
            session.flush()
            session.add(
                Demonstration(
                    id=f"dem-{number}",
                    prompt_id=prompt.id,
                    user_id=user.id,
                    content=("lemon", "a lemon")[number // 8 % 2],
                    tags=[],
                )
            )


def request_cycle(sessions: sessionmaker[Session], method: str | None = None) -> int:
    with sessions.begin() as session:
        row = Cycle(trigger="operator", stage="requested", metrics={"method": method} if method else {})
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
        for _ in range(6000):
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


def try_challengers(sessions: sessionmaker[Session]) -> threading.Thread:
    """Stands in for the service: puts the next challenger on trial, which it loses."""

    def watch() -> None:
        name = None
        for _ in range(6000):
            time.sleep(0.1)
            with sessions.begin() as session:
                deployment = session.get_one(Deployment, 1)
                if name is None and deployment.challenger is not None:
                    name = deployment.challenger
                    session.get_one(Policy, name).state = "verified"
                    votes = {"wins": 3, "losses": 17}
                    session.add(
                        Duel(
                            kind="trial",
                            challenger=name,
                            incumbent=deployment.live,
                            votes_per_user=1,
                            metrics=votes,
                        )
                    )
                elif name is not None and session.get_one(Cycle, 1).stage == "duel":
                    policy = session.get_one(Policy, name)
                    policy.state, policy.reason = "rejected", "the votes prove it worse"
                    deployment.challenger = None
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.usefixtures("_open_gate", "_with_charts")
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
    assert ended.metrics["reward_model"]["held_out_by"] == "prompt"  # one user alone can teach
    assert len(ended.metrics["training"]["iterations"]) == 3
    folder = settings.state / "cycles" / f"{ended.id:06d}"
    assert "Cycle 1: promoted" in (folder / "report.html").read_text()
    assert list((folder / "tensorboard").glob("events*"))


def test_the_fleet_is_what_serves_and_users_are_those_who_asked_lately(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    def sampler(**changes: object) -> FleetSampler | None:
        return cycle._fleet_sampler(cycle.Run(settings.model_copy(update=changes), sessions, QUIET, 1, {}))

    assert sampler() is None
    fleet = sampler(rollouts="fleet", engine_urls=("http://a", "http://b/", "http://c"))
    assert fleet is not None
    with sessions.begin() as session:
        states = {"http://b": "draining", "http://c": "removed", "http://d": "serving"}
        session.add_all(ReplicaRow(url=url, state=state) for url, state in states.items())
    assert fleet._addresses() == ["http://a", "http://d"]
    assert fleet._idle_seconds() == math.inf
    add_votes(sessions, 1)
    assert 0 <= fleet._idle_seconds() < 20
    with sessions.begin() as session:  # an import's
        user = session.scalars(select(User)).one()
        for days in (-30, 30):
            asked_at = func.now() + timedelta(days=days)
            session.add(Prompt(user_id=user.id, messages=[], created_at=asked_at))
    assert 0 <= fleet._idle_seconds() < 20
    with sessions.begin() as session:
        session.execute(update(Prompt).values(created_at=func.now() - timedelta(minutes=2)))
    assert 120 <= fleet._idle_seconds() < 140


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
def test_demonstrations_become_the_anchor_of_the_cycles_after_it(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_demonstrations(sessions, 24)
    service = accept_challengers(sessions)
    ended = run(settings, sessions, request_cycle(sessions, "sft"))
    service.join()
    assert (ended.stage, ended.reason) == ("promoted", "policy-000001 is live.")
    assert ended.metrics["training"]["method"] == "sft"
    names = [check["name"] for check in ended.metrics["gate"]["checks"]]
    assert (names[0], "judge" in names, "kl" in names) == ("demonstrations", False, False)
    with sessions() as session:
        made = session.get_one(Policy, "policy-000001")
    assert (made.parent, made.manifest["anchor"]) == (BASE, "policy-000001")
    assert read_folder(made.name, Path(made.path)).probe

    add_votes(sessions, 40)
    service = accept_challengers(sessions)
    ended = run(settings, sessions, request_cycle(sessions))
    service.join()
    assert ended.stage == "promoted"
    with sessions() as session:
        learnt = session.get_one(Policy, "policy-000002")
    assert (learnt.parent, learnt.manifest["anchor"]) == ("policy-000001", "policy-000001")
    iterations = ended.metrics["training"]["iterations"]
    assert iterations[0]["kl"] == 0.0  # it begins as its anchor, which is far from the base
    with sessions() as session:
        base = session.get_one(Policy, BASE).path
    roles = Roles.load(base, 4, Path(made.path))
    batch = Batch.collate([(roles.prompt_ids([{"role": "user", "content": "?"}]), [40, 1])], 0, roles.device)
    assert (roles.logprobs(batch) - roles.read(batch).logprobs).abs().max() > 0.5


@pytest.mark.usefixtures("_open_gate")
def test_votes_judge_a_new_anchor_where_there_are_enough(
    settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = gate.Check("judge", -1.0, 0.0, False, "")
    seen: list[gate.Sample] = []

    def decide(candidate: gate.Sample, *_: object) -> gate.Verdict:
        seen.append(candidate)
        return gate.Verdict([refusing])

    monkeypatch.setattr(gate, "decide_anchor", decide)
    add_votes(sessions, 30)
    add_demonstrations(sessions, 24)
    ended = run(settings, sessions, request_cycle(sessions, "sft"))
    assert (ended.stage, ended.reason) == ("rejected", "The gate refused it: judge -1.000 (needs 0.000).")
    assert len(seen[0].judged) >= gate.NUM_ANSWERS
    assert len(seen[0].preference) == 30
    with sessions() as session:
        assert session.get_one(Deployment, 1).challenger is None


@pytest.mark.parametrize(
    ("count", "reason"),
    [(15, "There are 15 demonstrations, and 16 are needed."), (0, "There are 0 demonstrations")],
)
def test_too_few_demonstrations_end_the_cycle_with_a_reason(
    settings: Settings, sessions: sessionmaker[Session], count: int, reason: str
) -> None:
    add_demonstrations(sessions, count)
    ended = run(settings, sessions, request_cycle(sessions, "sft"))
    assert ended.stage == "failed"
    assert reason in (ended.reason or "")


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_method_that_trains_adapters_says_so_where_all_weights_are_to_be_trained(
    method: str, full: Settings, sessions: sessionmaker[Session]
) -> None:
    ended = run(full, sessions, request_cycle(sessions, method))
    assert (ended.stage, ended.reason) == (
        "failed",
        f"Method {method} trains adapters alone: set RATCHET_TUNING=lora.",
    )


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_method_that_trains_in_one_process_says_so_to_several(
    method: str, settings: Settings, sessions: sessionmaker[Session]
) -> None:
    cycle_id = request_cycle(sessions, method)
    cycle.run_cycle(settings, sessions, cycle_id, QUIET, Team(rank=0, size=2))
    with sessions() as session:
        ended = session.get_one(Cycle, cycle_id)
    assert (ended.stage, ended.reason) == (
        "failed",
        f"Method {method} trains in one process: start the trainer alone.",
    )


@pytest.mark.usefixtures("_open_gate")
def test_a_cycle_waits_for_its_policys_duel_and_says_how_it_ended(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 40)
    watcher = try_challengers(sessions)
    ended = run(settings, sessions, request_cycle(sessions))
    watcher.join()
    assert ended.stage == "rejected"
    assert ended.reason == "policy-000001 did not go live: the votes prove it worse"
    assert ended.metrics["duel"] == {"wins": 3, "losses": 17}


@pytest.mark.usefixtures("_open_gate")
def test_the_next_cycle_starts_from_the_live_policy_and_does_not_propose_again_what_was_taken_back(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 30)
    for parent in (BASE, "policy-000001"):
        service = accept_challengers(sessions)
        ended = run(settings, sessions, request_cycle(sessions))
        service.join()
        with sessions() as session:
            assert session.get_one(Policy, ended.policy).parent == parent
    # What was taken back is not proposed again from the same votes.
    with sessions.begin() as session:
        session.get_one(Policy, "policy-000002").state = "rolled_back"
    again = run(settings, sessions, request_cycle(sessions))
    assert (again.stage, again.reason) == (
        "rejected",
        "policy-000002 learnt from exactly these votes, and was taken back.",
    )


@pytest.mark.usefixtures("_open_gate")
def test_a_whole_model_is_trained_and_published_and_the_next_cycle_begins_as_it(
    full: Settings, sessions: sessionmaker[Session], base: Path
) -> None:
    add_votes(sessions, 30)
    begun_with_kl = []
    for parent in (BASE, "policy-000001"):
        service = accept_challengers(sessions)
        ended = run(full, sessions, request_cycle(sessions))
        service.join()
        assert ended.stage == "promoted"
        with sessions() as session:
            policy = session.get_one(Policy, ended.policy)
        assert (policy.parent, policy.manifest["anchor"], policy.manifest["tuning"]) == (parent, BASE, "full")
        assert read_folder(policy.name, Path(policy.path), base, merged=True).probe
        assert not list(Path(policy.path).glob("adapter*"))
        assert not list(full.state.glob("cycles/*/checkpoints"))
        begun_with_kl.append(ended.metrics["training"]["iterations"][0]["kl"])
    assert begun_with_kl[0] == 0.0
    assert begun_with_kl[1] > 0.0


def test_whole_models_that_the_gate_refuses_leave_no_checkpoints_behind(
    full: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = gate.Check("guard", 0.5, 0.6, False, "")
    monkeypatch.setattr(gate, "decide", lambda *_, **__: gate.Verdict([failing]))
    monkeypatch.setattr("trainer.ppo_run.choose_kept", lambda iterations: 2)
    add_votes(sessions, 30)
    ended = run(full, sessions, request_cycle(sessions))
    assert (ended.stage, ended.reason) == ("rejected", "The gate refused it: guard 0.500 (needs 0.600).")
    assert not list(full.state.glob("cycles/*/checkpoints"))


@pytest.mark.usefixtures("_open_gate")
def test_all_weights_can_be_trained_from_an_adapter_on_but_not_the_other_way_round(
    full: Settings, settings: Settings, sessions: sessionmaker[Session], base: Path
) -> None:
    add_votes(sessions, 30)
    for tuning in (settings.model_copy(update={"delivery": "merged"}), full):
        service = accept_challengers(sessions)
        ended = run(tuning, sessions, request_cycle(sessions))
        service.join()
        assert ended.stage == "promoted"
    with sessions() as session:
        adapter, whole = (session.get_one(Policy, f"policy-00000{number}") for number in (1, 2))
    assert whole.parent == adapter.name
    assert ended.metrics["training"]["iterations"][0]["kl"] > 0.0  # it began as the adapter had made it
    ended = run(settings, sessions, request_cycle(sessions))
    assert (ended.stage, ended.reason) == (
        "failed",
        "policy-000002 is a whole model, and an adapter goes over the base alone: set RATCHET_TUNING=full, "
        "or go back to a policy that is an adapter (ratchet rollback).",
    )
    with sessions.begin() as session:  # as a rollback does
        session.get_one(Deployment, 1).live = adapter.name
    service = accept_challengers(sessions)
    ended = run(settings, sessions, request_cycle(sessions))
    service.join()
    assert (ended.stage, ended.policy) == ("promoted", "policy-000003")


@pytest.mark.usefixtures("_open_gate")
def test_a_cycle_that_was_cut_off_keeps_its_checkpoints_and_begins_anew_with_another_tuning(
    full: Settings, settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate, checkpoints = PPO.iterate, full.state / "cycles" / "000001" / "checkpoints"

    def die_in_the_third(ppo: PPO, number: int) -> Iteration:
        if number == 2:
            raise KeyboardInterrupt
        return iterate(ppo, number)

    add_votes(sessions, 30)
    cycle_id = request_cycle(sessions)
    with monkeypatch.context() as broken:
        broken.setattr(PPO, "iterate", die_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            cycle.run_cycle(full, sessions, cycle_id, QUIET)
    assert (checkpoints / "under-way.pt").exists()
    service = accept_challengers(sessions)
    ended = run(settings, sessions, cycle_id)
    service.join()
    assert ended.stage == "promoted"
    assert len(ended.metrics["training"]["iterations"]) == 3
    with sessions() as session:
        assert session.get_one(Policy, ended.policy).manifest["tuning"] == "lora"


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


def test_votes_that_contradict_each_other_end_without_a_policy(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 40)
    with sessions.begin() as session:  # the same two replies to the same prompt, liked and disliked in turn
        for number, reply in enumerate(session.scalars(select(Reply).order_by(Reply.prompt_id, Reply.id))):
            reply.content = f"what {number % 2}"
        for number, vote in enumerate(session.scalars(select(Vote).order_by(Vote.id))):
            vote.choice = ("first", "second")[number // 2 % 2]
    ended = run(settings, sessions, request_cycle(sessions))
    assert ended.stage == "rejected"
    assert "gate refused it" in (ended.reason or "")
    assert not list(settings.state.glob("policies/*"))


@pytest.mark.usefixtures("_open_gate")
def test_replies_that_are_empty_or_longer_than_the_context_spoil_nothing(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    add_votes(sessions, 30)
    with sessions.begin() as session:
        replies = session.scalars(select(Reply).order_by(Reply.id)).all()
        replies[0].content, replies[10].content = "", "what " * 2000
    service = accept_challengers(sessions)
    ended = run(settings, sessions, request_cycle(sessions))
    service.join()
    assert ended.stage == "promoted"
    assert (
        ended.metrics["reward_model"]["train_pairs"] + ended.metrics["reward_model"]["held_out_pairs"] == 29
    )


def test_a_tokenizer_without_an_end_token_ends_the_cycle_saying_so(
    settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Roles.load

    def without_end(*arguments: Any) -> Roles:
        roles = load(*arguments)
        roles.tokenizer.eos_token = None
        roles.model.generation_config.eos_token_id = None
        return roles

    monkeypatch.setattr(Roles, "load", staticmethod(without_end))
    add_votes(sessions, 30)
    ended = run(settings, sessions, request_cycle(sessions))
    assert ended.stage == "failed"
    assert "names no end-of-sequence token" in (ended.reason or "")


@pytest.mark.usefixtures("_open_gate")
def test_a_snapshot_whose_votes_were_deleted_since_is_still_learnt_from(
    settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_votes(sessions, 30)
    cycle_id = request_cycle(sessions)
    with monkeypatch.context() as broken:
        broken.setattr("trainer.ppo.PPO.iterate", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in (run(settings, sessions, cycle_id).reason or "")
    with sessions.begin() as session:
        session.execute(update(Cycle).values(ended_at=None))
        for table in (Vote, ComparisonReply, Comparison):
            session.execute(delete(table))
    service = accept_challengers(sessions)
    ended = run(settings, sessions, cycle_id)
    service.join()
    assert (ended.stage, ended.metrics["snapshot"]["votes"]) == ("promoted", 30)


@pytest.mark.usefixtures("_open_gate")
@pytest.mark.parametrize("writes", ["trainer.iterations.torch.save", "trainer.publish.save_adapter"])
def test_a_full_disk_ends_the_cycle_with_nothing_half_published(
    settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch, writes: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writes, full)
    add_votes(sessions, 30)
    ended = run(settings, sessions, request_cycle(sessions))
    assert ended.stage == "failed"
    assert "No space left on device" in (ended.reason or "")
    assert not list(settings.state.glob("policies/*/READY"))
    with sessions() as session:
        assert session.get_one(Deployment, 1).challenger is None
        assert session.scalars(select(Policy.name)).all() == [BASE]


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
    monkeypatch.setattr("trainer.ppo_run.choose_kept", lambda iterations: 2)
    add_votes(sessions, 30)
    ended = run(settings, sessions, request_cycle(sessions))
    assert (ended.stage, ended.reason) == ("rejected", "The gate refused it: guard 0.500 (needs 0.600).")
    with sessions() as session:
        assert session.get_one(Deployment, 1).challenger is None


@pytest.mark.usefixtures("_open_gate")
def test_weights_that_training_has_not_changed_are_not_proposed(
    settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "trainer.ppo_run.choose_kept", lambda iterations: 1
    )  # the first iteration's steps are of size 0
    add_votes(sessions, 30)
    ended = run(settings, sessions, request_cycle(sessions))
    assert (ended.stage, ended.reason) == (
        "rejected",
        "The gate refused it: the judge liked none of its policies better than live.",
    )


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


@pytest.mark.parametrize(("error", "open_after"), [(Parted, True), (OSError, False)])
def test_a_trainer_that_is_out_of_step_with_its_followers_ends(
    error: type[BaseException],
    open_after: bool,
    settings: Settings,
    sessions: sessionmaker[Session],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    team, codes = Team(rank=0, size=2), list[int]()

    def part(*_: object) -> None:
        team.in_step = False
        raise error("gone")

    monkeypatch.setattr("trainer.ppo_run.train", part)
    monkeypatch.setattr(Team, "tell", lambda self, mine: mine)
    monkeypatch.setattr("trainer.__main__.os._exit", codes.append)
    add_votes(sessions, 30)
    cycle_id = request_cycle(sessions)
    tick(settings, sync_engine(settings), sessions, QUIET, team)
    assert codes == [1]
    with sessions() as session:
        assert (session.get_one(Cycle, cycle_id).ended_at is None) == open_after


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
