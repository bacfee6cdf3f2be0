"""Cycles that end badly: each with a reason, and nothing half-published."""

import errno
from typing import Any

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.policies import BASE
from service.settings import Settings
from service.tables import (
    Comparison,
    ComparisonReply,
    Cycle,
    Deployment,
    Policy,
    Prompt,
    Reply,
    Vote,
)
from tests.trainer.cycles.acts import (
    accept_challengers,
    add_votes,
    request_cycle,
    run,
)
from trainer import gate
from trainer.models import Roles

pytestmark = pytest.mark.database


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
