"""A whole cycle from votes to a live policy, by each method, and how it is taken up again."""

import json
import math
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.database import sync_engine
from service.policies import BASE, read_folder
from service.settings import Settings
from service.tables import (
    Cycle,
    Deployment,
    Policy,
    Prompt,
    ReplicaRow,
    Snapshot,
    SnapshotFeedback,
    User,
    Vote,
)
from service.weights import CONFIG
from tests.trainer.cycles.acts import (
    QUIET,
    accept_challengers,
    add_demonstrations,
    add_prompts,
    add_votes,
    request_cycle,
    run,
    try_challengers,
)
from trainer import cycle, gate
from trainer.__main__ import tick
from trainer.batches import Batch
from trainer.fleet_rollouts import FleetSampler
from trainer.iterations import Iteration
from trainer.models import Roles
from trainer.ppo import PPO
from trainer.team import Parted, Team

pytestmark = pytest.mark.database


@pytest.mark.usefixtures("_open_gate", "_with_charts")
def test_votes_become_a_live_policy_with_its_whole_lineage(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    settings = settings.model_copy(update={"lora_layers": 0.5})
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
    targets = json.loads((Path(policy.path) / CONFIG).read_text())["target_modules"]
    assert "model.layers.1.mlp.up_proj" in targets
    assert not any("layers.0" in target for target in targets)
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
    assert 0 <= fleet._idle_seconds() < 100
    with sessions.begin() as session:  # an import's
        user = session.scalars(select(User)).one()
        for days in (-30, 30):
            asked_at = func.now() + timedelta(days=days)
            session.add(Prompt(user_id=user.id, messages=[], created_at=asked_at))
    assert 0 <= fleet._idle_seconds() < 100
    with sessions.begin() as session:
        session.execute(update(Prompt).values(created_at=func.now() - timedelta(minutes=2)))
    assert 120 <= fleet._idle_seconds() < 300


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
    # What was taken back is not proposed again from the same votes, whatever else was asked since.
    add_prompts(sessions, "ann", 3)
    with sessions.begin() as session:
        session.get_one(Policy, "policy-000002").state = "rolled_back"
    again = run(settings, sessions, request_cycle(sessions))
    assert (again.stage, again.reason) == (
        "rejected",
        "policy-000002 learnt from exactly these votes, and was taken back.",
    )
    assert (ended.metrics["snapshot"]["prompts"], again.metrics["snapshot"]["prompts"]) == (0, 3)


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
