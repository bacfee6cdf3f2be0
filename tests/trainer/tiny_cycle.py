"""A cycle on a tiny model without a database: votes are learnt from, and what comes out is published."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from service.settings import Tuning
from trainer import gate, preferences
from trainer.guard import Guard
from trainer.learning import Recipe, learn
from trainer.models import Origin, Roles
from trainer.ppo import PPOSettings
from trainer.publish import Lineage, publish
from trainer.reward_model import RewardSettings
from trainer.snapshot import Feedback
from trainer.team import ALONE, Team
from trainer.whole import load_roles

RANK = 4
SEED = 1
NAME = "policy-000001"
RECIPE = Recipe(
    # The first iteration's steps are of size 0, and the last one's are never kept.
    policy=PPOSettings(iterations=4, warmup=1, rollouts=8, minibatch=8, max_tokens=5),
    reward=RewardSettings(members=2),
)
GUARDS = [Guard([{"role": "user", "content": "A lemon?"}], right="yellow", wrong="blue")]
VOTES = [
    Feedback(
        kind="vote",
        id=str(number),
        user="/ann",
        messages=[{"role": "user", "content": "Is it so" + ", or so" * (number % 4) + f", {number}?"}],
        replies=["a lemon is yellow", "no"],
        ranks=[1, 2] if number % 8 else [1, 1],
        policies=["policy-000000"] * 2,
        imported=False,
    )
    for number in range(24)
]


class Unwatched:
    """Nobody wants to know how it goes."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def enter(self, stage: str) -> None:
        pass

    def note(self, **metrics: Any) -> None:
        self.metrics |= metrics

    def say(self, line: str) -> None:
        pass

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        pass


def open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model learns nothing that a gate would let pass, or a judge like; and a few answers show that as well."""
    monkeypatch.setattr(gate, "NUM_ANSWERS", 32)
    passing = gate.Check("test", 1.0, 1.0, True, "let pass")
    monkeypatch.setattr(gate, "decide", lambda *_, **__: gate.Verdict([passing]))
    monkeypatch.setattr("trainer.ppo_run.choose_kept", lambda iterations: len(iterations) - 1)


def learn_and_publish(roles: Roles, folder: Path, recipe: Recipe = RECIPE, team: Team = ALONE) -> Path:
    """Votes become a published policy. Returns its folder."""
    watch = Unwatched()
    lesson = preferences.read(roles, VOTES, votes_per_user=100)
    learned = learn(roles, lesson.preferences, GUARDS, recipe, SEED, checkpoints_in(folder), watch, team)
    lineage = Lineage(
        name=NAME,
        parent="policy-000000",
        anchor="policy-000000",
        base="base",
        cycle=1,
        snapshot="",
        seed=SEED,
        settings={},
        metrics={"kept": asdict(learned.kept)} | {name: watch.metrics[name] for name in ("training", "gate")},
    )
    return publish(roles, learned.probes, lineage, policies_in(folder), merged=True)


def checkpoints_in(folder: Path) -> Path:
    return folder / "checkpoints"


def policies_in(folder: Path) -> Path:
    return folder / "policies"


def run_trainer(base: Path, folder: Path, iterations: int, tuning: Tuning = "lora") -> None:
    """A process that may be killed: it goes on where the last one stopped, until a policy is published."""
    if (policies_in(folder) / NAME / "READY").exists():
        return
    logging.disable_progress_bar()  # a bar has locks, which a process that is killed leaves behind
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    recipe = replace(RECIPE, policy=replace(RECIPE.policy, iterations=iterations))
    with pytest.MonkeyPatch.context() as patch:
        open_gate(patch)
        learn_and_publish(load_roles(Origin(base, RANK, tuning=tuning)), folder, recipe)
