"""READ FIRST. One cycle: snapshot -> reward model -> PPO -> gate -> swap -> duel, from votes to a policy that answers users.

Or, where an operator asks for it, snapshot -> fine-tuning -> gate -> swap -> duel, from demonstrations to a new anchor.

Every stage is written to the cycle's row as it begins, with what it measured, so that the pages and the command line can watch.
A cycle that was cut off is taken up again from its snapshot; one whose policy was published already only waits for what becomes of it.
"""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session, sessionmaker
from torch.utils.tensorboard import SummaryWriter

from service import replicas
from service.policies import BASE, CHANNEL
from service.settings import Settings
from service.tables import Cycle, Deployment, Duel, Policy, Prompt, Snapshot
from trainer import ppo, preferences, publish, report, reward_model, snapshot, whole
from trainer.anchoring import Anchored, TooFewDemonstrations, learn_anchor
from trainer.features import FULLY_ASKED
from trainer.fleet_rollouts import FleetSampler
from trainer.guard import Guard, load_guards
from trainer.learning import Learned, Method, Recipe, Refused, TooFewVotes, learn
from trainer.models import Origin, Roles
from trainer.team import ALONE, Team

SWAP_SECONDS = 300.0
"""How long the service may take to verify a policy."""
RECENT_PROMPTS = 1000
"""The newest rows, of which the latest tells when a user last asked. (An import's have the time that the file gives them.)"""


class CycleEnded(Exception):
    """The cycle ends here without a new policy. `stage` is `rejected` or `failed`, the message says why."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


@dataclass(slots=True)
class Run:
    """One cycle under way."""

    settings: Settings
    sessions: sessionmaker[Session]
    console: Console
    id: int
    metrics: dict[str, Any]
    team: Team = ALONE
    board: SummaryWriter | None = None

    @property
    def folder(self) -> Path:
        return self.settings.state / "cycles" / f"{self.id:06d}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def seed(self) -> int:
        return self.settings.seed + self.id

    @property
    def method(self) -> Method:
        """The one that the operator asked for, else the one that is set."""
        return cast(Method, self.metrics.get("method", self.settings.method))

    def enter(self, stage: str) -> None:
        """Begins a stage: one line on the console, one in the database."""
        self.say(stage)
        self.metrics["progress"] = {"stage": stage, "done": 0, "total": 0}
        with self.sessions.begin() as session:
            row = session.get_one(Cycle, self.id)
            row.stage, row.metrics = stage, dict(self.metrics)

    def note(self, **metrics: Any) -> None:
        """Adds to what the cycle's row shows."""
        self.metrics |= metrics
        with self.sessions.begin() as session:
            session.get_one(Cycle, self.id).metrics = dict(self.metrics)

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """To TensorBoard, in the cycle's folder."""
        if self.board is None:
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def say(self, line: str) -> None:
        """One line on the console."""
        self.console.print(f"cycle {self.id}: {line}")


@dataclass(frozen=True, slots=True)
class Start:
    """The policy that a cycle starts from, and the one that it measures KL to."""

    live: str
    base: Path
    folder: Path | None
    """Of the live policy; None: it is the base."""
    anchor: str
    """That of the live policy, which may be itself."""
    anchor_folder: Path | None


def run_cycle(
    settings: Settings,
    sessions: sessionmaker[Session],
    cycle_id: int,
    console: Console,
    team: Team = ALONE,
) -> None:
    """Runs or takes up a cycle to its end. What goes wrong ends the cycle, never the trainer; live stays as it is.

    team: led by this process. Raises Parted where it has lost the others; the cycle can then be taken up again.
    """
    with sessions() as session:
        metrics = dict(session.get_one(Cycle, cycle_id).metrics)
    run = Run(settings, sessions, console, cycle_id, metrics, team)
    try:
        policy = _find_published(run) or _learn(run)
        _clear(run)
        run.enter("swap")
        stage, reason = _await_swap(run, policy)
    except CycleEnded as end:
        stage, reason = end.stage, str(end)
    except Exception as error:  # the edge of the process: logged, stored, and the next cycle may do better
        console.print_exception()
        stage, reason = "failed", f"{type(error).__name__}: {error}"
    with sessions.begin() as session:
        row = session.get_one(Cycle, cycle_id)
        row.stage, row.reason, row.ended_at = stage, reason, func.now()
    run.say(f"{stage}: {reason}")
    _clear(run)
    _report(run, stage, reason)


def _clear(run: Run) -> None:
    """Checkpoints of whole models fill a disk, and are for taking up again what is not published yet, and has not ended."""
    if run.settings.tuning == "full":
        shutil.rmtree(run.checkpoints, ignore_errors=True)


def _report(run: Run, stage: str, reason: str) -> None:
    """For people. That it cannot be written is said, and changes nothing of how the cycle ended."""
    path = run.folder / report.REPORT
    try:
        if run.board is not None:
            run.board.close()
        run.folder.mkdir(parents=True, exist_ok=True)
        report.write(path, run.id, stage, reason, run.metrics)
        run.say(f"report: {path}")
    except Exception as error:
        run.say(f"the report could not be written: {type(error).__name__}: {error}")


def _learn(run: Run) -> str:
    """From votes to a published policy. Returns its name. Raises CycleEnded."""
    settings = run.settings
    torch.manual_seed(run.seed)
    started = time.monotonic()

    run.enter("snapshot")
    feedback, sha256 = _take_snapshot(run)
    _check_new(run, sha256)
    start = _find_start(run)
    recipe = _recipe(run, start)
    if recipe.method != "ppo" and run.team.size > 1:
        raise CycleEnded("failed", f"Method {recipe.method} trains in one process: start the trainer alone.")
    if recipe.method != "ppo" and settings.tuning == "full":
        raise CycleEnded("failed", f"Method {recipe.method} trains adapters alone: set RATCHET_TUNING=lora.")
    origin = Origin(
        start.base,
        settings.lora_rank,
        start.folder,
        start.anchor_folder,
        settings.tuning,
        settings.lora_layers,
    )
    roles = whole.load_roles(origin, run.team.device)
    lesson = preferences.read(roles, feedback, settings.votes_per_user)
    guards = load_guards(settings.guard, start.base)
    try:
        learned = _train(run, roles, lesson, guards, recipe)
    except (TooFewVotes, TooFewDemonstrations) as error:
        raise CycleEnded("failed", str(error)) from None
    except Refused as error:
        raise CycleEnded("rejected", str(error)) from None

    name = _next_name(run)
    lineage = publish.Lineage(
        name=name,
        parent=start.live,
        anchor=name if recipe.method == "sft" else start.anchor,
        base=str(start.base),
        cycle=run.id,
        snapshot=sha256,
        seed=run.seed,
        settings=asdict(recipe),
        metrics={
            "kept": asdict(learned.kept),
            **{part: run.metrics[part] for part in ("gate", "reward_model") if part in run.metrics},
            "seconds": time.monotonic() - started,
        },
    )
    folder = publish.publish(
        roles,
        learned.probes,
        lineage,
        settings.state / "policies",
        merged=settings.delivery == "merged",
    )
    _register(run, name, start.live, folder)
    return name


def _train(
    run: Run, roles: Roles, lesson: preferences.Lesson, guards: Sequence[Guard], recipe: Recipe
) -> Learned | Anchored:
    if recipe.method == "sft":
        return learn_anchor(roles, lesson, guards, recipe, run.seed, run.checkpoints, run)
    return learn(
        roles,
        lesson.preferences,
        guards,
        recipe,
        run.seed,
        run.checkpoints,
        run,
        run.team,
        _fleet_sampler(run),
    )


def _fleet_sampler(run: Run) -> FleetSampler | None:
    """None where the trainer samples for itself."""
    if run.settings.rollouts == "local":
        return None

    def addresses() -> list[str]:
        with run.sessions() as session:
            wanted = replicas.read_now(session, run.settings.replica_urls)
        return [url for url, state in wanted.items() if state == "serving"]

    def idle_seconds() -> float:
        now = func.clock_timestamp()
        newest = select(Prompt.created_at).where(Prompt.created_at <= now).order_by(Prompt.id.desc())
        latest = func.max(newest.limit(RECENT_PROMPTS).subquery().c.created_at)
        with run.sessions() as session:
            seconds = session.scalar(select(func.extract("epoch", now - latest)))
        return math.inf if seconds is None else float(seconds)

    return FleetSampler(addresses, idle_seconds, run.folder, run.say)


def _recipe(run: Run, start: Start) -> Recipe:
    """The trainer's defaults, with what the settings and the operator say."""
    settings = run.settings
    policy = ppo.PPOSettings(
        iterations=settings.ppo_iterations,
        rollouts=settings.ppo_rollouts,
        kl_budget=settings.kl_budget,
        kl_start=_inherited_coefficient(start),
        max_tokens=settings.max_reply_tokens,
    )
    if settings.tuning == "full":
        policy = replace(policy, learning_rate_times_width=whole.LEARNING_RATE_TIMES_WIDTH)
    return Recipe(
        method=run.method,
        policy=policy,
        reward=reward_model.RewardSettings(length_bias=settings.reward_length_bias),
        served_min_p=settings.default_min_p,
    )


def _take_snapshot(run: Run) -> tuple[list[snapshot.Feedback], str]:
    """The cycle's own snapshot where it has one, else one of all that there is now."""
    path = snapshot.file_of(run.settings.state / "cycles", run.id)
    with run.sessions.begin() as session:
        row = session.get_one(Cycle, run.id)
        if row.snapshot_sha256 is not None and path.exists():
            return snapshot.load(path, row.snapshot_sha256), row.snapshot_sha256
        run.folder.mkdir(parents=True, exist_ok=True)
        # PPO alone trains on prompts; no more than the anchor can be asked as often as it should be.
        per_vote = run.settings.prompts_per_vote if run.method == "ppo" else 0
        feedback = snapshot.take(session, per_vote, FULLY_ASKED)
        row.snapshot_sha256 = snapshot.save(feedback, path, session)
        sha256 = row.snapshot_sha256
    kinds = Counter(row.kind for row in feedback)
    run.note(
        snapshot={
            "sha256": sha256,
            "votes": kinds["vote"],
            "rankings": kinds["ranking"],
            "demonstrations": kinds["demonstration"],
            "prompts": kinds["prompt"],
        }
    )
    return feedback, sha256


def _check_new(run: Run, sha256: str) -> None:
    """Raises CycleEnded where a policy of just this snapshot's feedback and this method was live and has been taken back."""
    with run.sessions() as session:
        feedback = select(Snapshot.feedback_sha256).where(Snapshot.sha256 == sha256).scalar_subquery()
        taken_back = session.scalars(
            select(Policy)
            .join(Cycle, Policy.cycle_id == Cycle.id)
            .join(Snapshot, Snapshot.sha256 == Cycle.snapshot_sha256)
            .where(Snapshot.feedback_sha256 == feedback, Policy.state == "rolled_back")
        )
        names = [policy.name for policy in taken_back if _method_of(policy.manifest) == run.method]
    for name in names:
        raise CycleEnded("rejected", f"{name} learnt from exactly these votes, and was taken back.")


def _find_start(run: Run) -> Start:
    """Raises CycleEnded where an adapter cannot begin there."""
    with run.sessions() as session:
        deployment = session.get_one(Deployment, 1)
        live = session.get_one(Policy, deployment.live)
        anchor = session.get_one(Policy, live.manifest.get("anchor", BASE))
        base = session.get_one(Policy, BASE)
    if run.settings.tuning == "lora":
        for name in (policy.name for policy in (live, anchor) if policy.manifest.get("tuning") == "full"):
            raise CycleEnded(
                "failed",
                f"{name} is a whole model, and an adapter goes over the base alone: set RATCHET_TUNING=full, "
                "or go back to a policy that is an adapter (ratchet rollback).",
            )
    return Start(live.name, Path(base.path), _folder_of(live), anchor.name, _folder_of(anchor))


def _folder_of(policy: Policy) -> Path | None:
    return Path(policy.path) if policy.name != BASE else None


def _method_of(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("settings", {}).get("method", "ppo"))


def _inherited_coefficient(start: Start) -> float:
    """The KL coefficient that the live policy was kept at: a cycle goes on where the last one left off."""
    if start.folder is None:
        return ppo.PPOSettings().kl_start
    manifest = json.loads((start.folder / "manifest.json").read_text())
    if _method_of(manifest) != "ppo":  # the others have none
        return ppo.PPOSettings().kl_start
    return float(manifest["metrics"]["kept"]["kl_coefficient"])


def _next_name(run: Run) -> str:
    """One past the highest number that the database or the folder knows."""
    with run.sessions() as session:
        names = list(session.scalars(select(Policy.name)))
    folder = run.settings.state / "policies"
    names += [path.parent.name for path in folder.glob("policy-*/READY")]
    return f"policy-{max(int(name.removeprefix('policy-')) for name in names) + 1:06d}"


def _register(run: Run, name: str, parent: str, folder: Path) -> None:
    """Makes the published policy the challenger, and tells the service."""
    manifest = json.loads((folder / "manifest.json").read_text())
    with run.sessions.begin() as session:
        policy = Policy(
            name=name, parent=parent, path=str(folder), cycle_id=run.id, state="published", manifest=manifest
        )
        session.add(policy)
        session.flush()
        session.get_one(Cycle, run.id).policy = name
        session.get_one(Deployment, 1).challenger = name
        session.execute(text(f"NOTIFY {CHANNEL}"))


def _find_published(run: Run) -> str | None:
    with run.sessions() as session:
        return session.get_one(Cycle, run.id).policy


def _await_swap(run: Run, policy: str) -> tuple[str, str]:
    """Until the service routes to the policy, or has refused it, or the users have: a duel takes as long as its votes."""
    deadline = time.monotonic() + SWAP_SECONDS
    on_trial = False
    while on_trial or time.monotonic() < deadline:
        with run.sessions() as session:
            row = session.get_one(Policy, policy)
            deployment = session.get_one(Deployment, 1)
            duel = session.scalar(select(Duel).where(Duel.challenger == policy).order_by(Duel.id.desc()))
        if row.state == "refused":
            return "failed", f"{policy} was not let live: {row.reason}"
        if row.state == "rejected":
            return "rejected", f"{policy} did not go live: {row.reason}"
        if row.state == "verified" and deployment.challenger != policy:
            return "promoted", f"{policy} is live."
        if duel is not None:
            if not on_trial:
                run.enter("duel")
                on_trial = True
            if duel.metrics != run.metrics.get("duel"):
                run.note(duel=duel.metrics)
        time.sleep(0.25)
    return (
        "failed",
        f"The service did not verify {policy} within {SWAP_SECONDS:.0f} s; it will when it is there again.",
    )
