"""The methods that `learning.py` compares: each learns from the same votes and answers the same questions."""

import json
import math
import os
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from service.intervals import wilson
from service.settings import Settings
from tests.benchmarks.learning_users import (
    NUM_QUESTIONS,
    Judged,
    SimulatedVote,
    as_reply,
    judge,
    judge_replies,
    sample_anchor,
)
from trainer import ppo, preferences, reward_model, reward_quality, world
from trainer.demo_client import Reply
from trainer.features import ask_consensus, read_features
from trainer.guard import load_guards
from trainer.learning import Method, Recipe, Refused, anchor_features, learn
from trainer.models import Roles
from trainer.rollouts import Sampler
from trainer.simulated_users import draw_evaluation
from trainer.snapshot import Feedback
from trainer.tastes import Taste

ROOT = Path(__file__).parents[2]
TRL = ROOT / ".venv-trl" / "bin" / "python"
BEST_OF = 16
WORDINGS = 8
"""Of an answer in a manner, of which `bound` takes the best."""
RANK = 16
VOTES_PER_USER = int(Settings.model_fields["votes_per_user"].default)
PROMPTS_PER_VOTE = int(Settings.model_fields["prompts_per_vote"].default)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a method gets, and what it is judged by."""

    starter: Path
    votes: Sequence[SimulatedVote]
    flip: float
    """Share of them that is turned round."""
    taste: Taste
    """For `judge` alone."""
    seed: int
    folder: Path
    """For what it writes, and what others may read; removed afterwards."""

    @property
    def unjudged(self) -> list[Feedback]:
        """What was asked besides, and nobody voted on: as much as a service keeps for so many votes."""
        rng = random.Random(f"chats {self.seed}")
        asked = [world.draw_question(rng) for _ in range(PROMPTS_PER_VOTE * len(self.votes))]
        return [
            Feedback("prompt", str(number), "", list(question.messages), [], None, [], False)
            for number, question in enumerate(asked)
        ]


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


def ours(lesson: Lesson, method: Method = "ppo") -> tuple[Judged, str]:
    """The trainer's own way, with its defaults."""
    torch.manual_seed(lesson.seed)  # of a new adapter, as a cycle does
    roles = Roles.load(lesson.starter, RANK)
    learnt, remark = learn_ours(lesson, roles, method, method=method)
    # Where the gate refused it the starter stays live, and is what users meet.
    return _judge(lesson, roles if learnt else Roles.load(lesson.starter, RANK)), remark


def learn_ours(
    lesson: Lesson, roles: Roles, name: str, cycle: int = 0, method: Method = "ppo"
) -> tuple[bool, str]:
    """Trains the policy in `roles`, which begins as the live one. Whether the gate let it pass, and what there is to say of it.

    name: of the folder for checkpoints.
    """
    notes = Notes()
    guards = load_guards(None, lesson.starter)
    unjudged = lesson.unjudged if method == "ppo" else ()
    learnt_from, seed = _read(roles, lesson.votes, unjudged), lesson.seed + cycle
    try:
        learn(roles, learnt_from, guards, Recipe(method=method), seed, lesson.folder / name, notes)
    except Refused as error:
        return False, str(error)
    kept, share = notes.metrics["gate"]["iteration"], notes.metrics["gate"]["share"]
    return True, f"kept {kept}" + (f", {share:.0%} of it" if share < 1 else "")


def best_of(lesson: Lesson) -> tuple[Judged, str]:
    """No training: of 16 replies by the starter, the one that the same reward model likes best."""
    roles = Roles.load(lesson.starter, RANK)
    questions = draw_evaluation(NUM_QUESTIONS, lesson.seed)
    prompts = [roles.prompt_ids(question.messages) for question in questions for _ in range(BEST_OF)]
    ensemble = _fit(lesson, roles, prompts)
    rollouts = sample_anchor(roles, prompts, lesson.seed + 1)
    features = read_features(roles, [(r.prompt_ids, r.reply_ids) for r in rollouts])
    scores = ensemble(features)
    pessimistic = scores.mean(1) - ppo.PPOSettings().disagreement * scores.std(1)
    best = pessimistic.view(-1, BEST_OF).argmax(1).tolist()
    chosen = [rollouts[number * BEST_OF + index] for number, index in enumerate(best)]
    kl = math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF  # an upper bound, arXiv:2401.01879
    return judge_replies(lesson.taste, questions, [as_reply(roles, rollout) for rollout in chosen], kl), ""


def bound(lesson: Lesson) -> tuple[Judged, str]:
    """No policy: of many right answers in all manners the one that the taste likes best.

    About the most that can be won: the starter says the best thing too at times, and what is as good counts half.
    """
    rng = random.Random(lesson.seed)
    questions = draw_evaluation(NUM_QUESTIONS, lesson.seed)
    replies = [Reply(_best_answer(question, lesson.taste, rng), "stop") for question in questions]
    return judge_replies(lesson.taste, questions, replies, kl=math.nan), ""


def _best_answer(question: world.Question, taste: Taste, rng: random.Random) -> str:
    answers = [
        world.demonstrate(question, rng, manner, wrong_share=0.0)
        for manner in world.MANNERS
        for _ in range(WORDINGS)
    ]
    return max(answers, key=lambda answer: taste(question.messages, answer))


def trl_ppo(lesson: Lesson, kl_coef: float) -> tuple[Judged, str]:
    """TRL's PPO against TRL's reward model: as many replies, in iterations of as many, as ours takes at most.

    It gets a learning rate and epochs that did well with it on like votes: its defaults are for models of billions.
    """
    settings = ppo.PPOSettings()
    roles = Roles.load(lesson.starter, RANK)
    learnt = _learn_by_trl(
        lesson,
        f"ppo-{kl_coef}",
        method="ppo",
        reward=str(_trl_reward_model(lesson, ()) / "model"),
        prompts=_read(roles, lesson.votes, lesson.unjudged).prompts,
        kl_coef=kl_coef,
        learning_rate=2e-4,
        samples=settings.rollouts,
        iterations=settings.iterations,
        epochs=2,
        reply_tokens=settings.max_tokens,
    )
    return learnt, ""


def trl_dpo(lesson: Lesson, learning_rate: float) -> tuple[Judged, str]:
    """TRL's DPO with its defaults."""
    name = f"dpo-{learning_rate}"
    return _learn_by_trl(lesson, name, method="dpo", learning_rate=learning_rate), ""


@dataclass(frozen=True, slots=True)
class RewardQuality:
    """How well a reward model tells what users of that taste prefer, on votes that nobody learnt from."""

    accuracy: float
    low: float
    high: float
    """95 % (Wilson)."""
    calibration_error: float
    """ECE, ten bins."""


def our_reward(lesson: Lesson, fresh: Sequence[SimulatedVote]) -> RewardQuality:
    """As a cycle fits it."""
    roles = Roles.load(lesson.starter, RANK)
    pairs = _read(roles, fresh).pairs
    head = _fit(lesson, roles, [pair.prompt for pair in pairs])
    quality = reward_quality.measure(roles, head, pairs)
    accuracy = quality.accuracy
    return RewardQuality(accuracy.share, accuracy.low, accuracy.high, quality.calibration_error)


def trl_reward(lesson: Lesson, fresh: Sequence[SimulatedVote]) -> RewardQuality:
    """TRL's `RewardTrainer` with its defaults, on all the votes. `trl_ppo` uses what it learns."""
    folder = _trl_reward_model(lesson, fresh)
    probabilities = torch.tensor(json.loads((folder / "margins.json").read_text())).sigmoid().tolist()
    right = [probability > 0.5 for probability in probabilities]
    low, high = wilson(sum(right), len(right))
    error = reward_quality.calibration_error([max(p, 1 - p) for p in probabilities], right)
    return RewardQuality(sum(right) / len(right), low, high, error)


def _trl_reward_model(lesson: Lesson, fresh: Sequence[SimulatedVote]) -> Path:
    """The folder of it; made by the first who wants it."""
    folder = lesson.folder / "reward"
    return folder if folder.exists() else _run_trl(lesson, "reward", method="reward", fresh=as_trl(fresh))


def _fit(lesson: Lesson, roles: Roles, prompts: Sequence[list[int]]) -> reward_model.Head:
    """The ensemble of a cycle: of the votes that it does not hold out. prompts: others that it is to score replies to."""
    settings = reward_model.RewardSettings()
    learnt_from = _read(roles, lesson.votes)
    train = preferences.split(learnt_from, settings.held_out, lesson.seed).train
    sampler = Sampler(roles.end_ids, 64)
    roles.consensus = ask_consensus(roles, sampler, [*learnt_from.prompts, *prompts], lesson.seed)
    own = anchor_features(roles, sampler, learnt_from.prompts, lesson.seed)
    return reward_model.fit(roles, train, own, settings, settings.members, lesson.seed)


def _read(
    roles: Roles, votes: Sequence[SimulatedVote], unjudged: Sequence[Feedback] = ()
) -> preferences.Preferences:
    feedback = [*(vote.as_feedback(number) for number, vote in enumerate(votes)), *unjudged]
    return preferences.read(roles, feedback, VOTES_PER_USER).preferences


def _learn_by_trl(lesson: Lesson, name: str, **asked: Any) -> Judged:
    learnt = Roles.load(_run_trl(lesson, name, **asked) / "model", RANK)
    return _judge(lesson, learnt, anchor=Roles.load(lesson.starter, RANK))


def _run_trl(lesson: Lesson, name: str, **asked: Any) -> Path:
    """A job in a folder of that name. Raises RuntimeError with the end of what it wrote where it failed."""
    folder = lesson.folder / name
    folder.mkdir()
    job = {
        "base": str(lesson.starter),
        "seed": lesson.seed,
        "threads": torch.get_num_threads(),
        "pairs": as_trl(lesson.votes),
        "fresh": [],
    }
    (folder / "job.json").write_text(json.dumps(job | asked))
    command = [str(TRL), "-m", "tests.benchmarks.learning_trl", str(folder)]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"TRL failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return folder


def as_trl(votes: Sequence[SimulatedVote]) -> list[dict[str, Any]]:
    """Votes that prefer one reply, in TRL's conversational format: it has no place for ties."""
    rows = []
    for vote in votes:
        replies = {"first": vote.first, "second": vote.second}
        if vote.choice in replies:
            chosen = replies.pop(vote.choice)
            [rejected] = replies.values()
            rows.append(
                {
                    "prompt": list(vote.messages),
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
    return rows


def _judge(lesson: Lesson, roles: Roles, anchor: Roles | None = None) -> Judged:
    return judge(roles, lesson.taste, lesson.seed, draw=1, anchor=anchor)


METHODS: dict[str, Callable[[Lesson], tuple[Judged, str]]] = {
    "ours": ours,
    "ours-dpo": partial(ours, method="dpo"),
    "best-of-16": best_of,
    "bound": bound,
    **{f"trl-ppo-{kl_coef}": partial(trl_ppo, kl_coef=kl_coef) for kl_coef in (0.02, 0.1, 0.3)},
    **{f"trl-dpo-{rate}": partial(trl_dpo, learning_rate=rate) for rate in (1e-4, 1e-5)},
}
