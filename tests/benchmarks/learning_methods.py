"""The methods that `learning.py` compares: each learns from the same votes and answers the same questions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.learning_users import (
    NUM_QUESTIONS,
    Judged,
    SimulatedVote,
    as_reply,
    judge,
    judge_replies,
    sample_anchor,
)
from trainer import ppo, preferences, reward_model
from trainer.guard import load_guards
from trainer.learning import Recipe, Refused, anchor_features, learn
from trainer.models import Roles
from trainer.rollouts import Sampler
from trainer.simulated_users import draw_evaluation
from trainer.tastes import Taste

BEST_OF = 16
VOTES_PER_USER = 100
"""The default."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a method gets, and what it is judged by."""

    starter: Path
    votes: Sequence[SimulatedVote]
    taste: Taste
    """For `judge` alone."""
    seed: int
    folder: Path
    """For what it writes; removed afterwards."""


@dataclass(slots=True)
class Notes:
    """Keeps what learning says of itself."""

    metrics: dict[str, Any] = field(default_factory=dict)

    def enter(self, stage: str) -> None:
        """Nothing to do."""

    def note(self, **metrics: Any) -> None:
        """Keep."""
        self.metrics |= metrics

    def say(self, line: str) -> None:
        """Nothing to do."""

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing to do."""


def ours(lesson: Lesson) -> tuple[Judged, str]:
    """The trainer's own way, with its defaults."""
    roles = Roles.load(lesson.starter, rank=16)
    learnt_from = _preferences(lesson, roles)
    notes, recipe = Notes(), Recipe()
    guards = load_guards(None, lesson.starter)
    try:
        learn(roles, learnt_from, guards, recipe, lesson.seed, lesson.folder, notes)
    except Refused as error:  # the starter stays live, and is what users meet
        return judge(Roles.load(lesson.starter, rank=16), lesson.taste, lesson.seed + 1), str(error)
    accuracy = notes.metrics["reward_model"]["accuracy"]["share"]
    remark = f"kept {notes.metrics['gate']['iteration']}, reward model {accuracy:.2f}"
    return judge(roles, lesson.taste, lesson.seed + 1), remark


def _preferences(lesson: Lesson, roles: Roles) -> preferences.Preferences:
    feedback = [vote.as_feedback(number) for number, vote in enumerate(lesson.votes)]
    return preferences.read(roles, feedback, VOTES_PER_USER).preferences


def best_of(lesson: Lesson) -> tuple[Judged, str]:
    """No training: of 16 replies by the starter, the one that the same reward model likes best."""
    roles = Roles.load(lesson.starter, rank=16)
    learnt_from = _preferences(lesson, roles)
    settings = reward_model.RewardSettings()
    train = preferences.split(learnt_from, settings.held_out, lesson.seed).train
    own = anchor_features(roles, Sampler(roles.end_ids, 64), learnt_from.prompts, lesson.seed)
    ensemble = reward_model.fit(roles, train, own, settings, settings.members, lesson.seed)
    questions = draw_evaluation(NUM_QUESTIONS)
    prompts = [roles.prompt_ids(question.messages) for question in questions for _ in range(BEST_OF)]
    rollouts = sample_anchor(roles, prompts, lesson.seed + 1)
    features = reward_model.read_features(roles, [(r.prompt_ids, r.reply_ids) for r in rollouts])
    scores = ensemble(features)
    pessimistic = scores.mean(1) - ppo.PPOSettings().disagreement * scores.std(1)
    best = pessimistic.view(-1, BEST_OF).argmax(1).tolist()
    chosen = [rollouts[number * BEST_OF + index] for number, index in enumerate(best)]
    kl = math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF  # an upper bound, arXiv:2401.01879
    return judge_replies(lesson.taste, questions, [as_reply(roles, rollout) for rollout in chosen], kl), ""


METHODS: dict[str, Callable[[Lesson], tuple[Judged, str]]] = {"ours": ours, "best-of-16": best_of}
