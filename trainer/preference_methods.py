"""DPO and ORPO, by TRL: the policy learnt from votes directly, without a reward model to climb. An alternative to PPO.

They fit the votes that they are given, wrong ones too. So a run is cut into equal stretches; between them the policy's own
replies are measured as PPO measures its rollouts, the held-out judge has its veto, and the KL budget is an end.

DPO (arXiv:2305.18290) is the robust kind, which expects a share of votes to be the wrong way round (rDPO, arXiv:2403.00409), with
the likelihood of the chosen replies beside it (arXiv:2404.19733): DPO alone soon makes both replies of a pair unlikely, and
nobody has voted for what it says instead. ORPO is arXiv:2403.07691. Ties teach neither: TRL has no soft labels, and a pair in
both directions would be counted twice.

Legend: N decided pairs.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import Trainer, TrainerCallback

from trainer.iterations import (
    ALL_DONE,
    GuardWatch,
    Iteration,
    Outcome,
    checkpoint_path,
    choose_kept,
    guarded,
    objection,
)
from trainer.measuring import measure
from trainer.models import POLICY, REFERENCE, Roles
from trainer.ppo import PPOSettings
from trainer.preferences import Pair
from trainer.reward_model import Head
from trainer.rollouts import Sampler
from trainer.trl_trainers import DPO, ORPO, DPOConfig, Lent, ORPOConfig, Schedule, keep_checkpoint, lend

MIN_PAIRS = 2
"""Decided pairs below which there is nothing to tell apart."""


@dataclass(frozen=True, slots=True)
class PreferenceSettings:
    """How the policy is trained. One default for every model, taste and seed."""

    method: Literal["dpo", "orpo"] = "dpo"
    iterations: int = 11
    """Policies measured, at least 2: the one that it began with, and one after each of the stretches between."""
    epochs: int = 6
    """Passes over the votes."""
    batch: int = 32
    """Pairs in an optimiser step."""
    learning_rate_times_width: float = 0.4
    """Learning rate times hidden size: 2e-3 at 192, 1e-4 at 4096."""
    beta: float = 0.1
    """DPO: how dear it is to leave the anchor, per nat."""
    label_noise: float = 0.1
    """DPO: share of votes that are taken to be the wrong way round, below 0.5."""
    likelihood_weight: float = 1.0
    """DPO: of the mean -log-probability per token of the chosen replies, beside the preference loss."""
    odds_weight: float = 1.0
    """ORPO: lambda, the weight of the odds ratio beside the likelihood of the chosen replies. TRL's 0.1 is for replies picked for
    their quality; ours are the policy's own samples, which likelihood alone teaches little."""


@dataclass(frozen=True, slots=True)
class PreferenceRun:
    """One training run, before it begins."""

    roles: Roles
    """Begins as the live policy."""
    ensemble: Head
    judge: Head
    pairs: Sequence[Pair]
    """To learn from: none that the judge was fit on."""
    prompts: Sequence[list[int]]
    """To measure on."""
    settings: PreferenceSettings
    scoring: PPOSettings
    """How replies are sampled and scored, and the KL budget: PPO's, so that the numbers of both compare."""
    seed: int


def train(
    run: PreferenceRun,
    checkpoints: Path,
    on_iteration: Callable[[Iteration], None],
    guard: GuardWatch | None = None,
) -> Outcome:
    """Trains until something objects, the KL budget is spent, or all is done; a checkpoint goes before each measurement.

    Leaves the last weights in `run.roles`, as PPO does. Raises NonFinite, and ValueError where too few pairs are decided.
    """
    decided = [pair for pair in run.pairs if pair.decided]
    if len(decided) < MIN_PAIRS:
        raise ValueError(
            f"{len(decided)} pairs prefer one reply, and {run.settings.method} needs {MIN_PAIRS}."
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    stretch = _count_steps(run.settings, len(decided))
    watch = _Watch(run, checkpoints, on_iteration, stretch, guard)
    watch.look()
    with lend(run.roles) as lent:
        trainer = _make_trainer(run, lent, decided, stretch * (run.settings.iterations - 1))
        trainer.add_callback(watch)
        trainer.train()
    return Outcome(watch.iterations, choose_kept(watch.iterations), watch.why)


def _count_steps(settings: PreferenceSettings, num_pairs: int) -> int:
    """Optimiser steps in a stretch."""
    steps = settings.epochs * math.ceil(num_pairs / settings.batch)
    return max(1, round(steps / (settings.iterations - 1)))


def _make_trainer(run: PreferenceRun, lent: Lent, pairs: Sequence[Pair], num_steps: int) -> Trainer:
    settings = run.settings
    rate = settings.learning_rate_times_width / run.roles.hidden_size
    schedule = Schedule(num_steps, settings.batch, rate, run.seed)
    if settings.method == "dpo":
        dpo = lent.arguments(
            DPOConfig,
            schedule,
            loss_type=["robust", "sft"],
            loss_weights=[1.0, settings.likelihood_weight],
            beta=settings.beta,
            label_smoothing=settings.label_noise,
            precompute_ref_log_probs=True,
            max_length=None,  # TRL's default cuts replies off, without a word
        )
        rows = _dpo_rows(run.roles, pairs)
        return DPO(lent.model, args=dpo, train_dataset=rows, processing_class=lent.tokenizer)
    longest = max(len(pair.prompt) + max(len(pair.first), len(pair.second)) for pair in pairs)
    orpo = lent.arguments(ORPOConfig, schedule, beta=settings.odds_weight, max_length=longest)
    return ORPO(lent.model, args=orpo, train_dataset=_orpo_rows(pairs), processing_class=lent.tokenizer)


def _chosen(pair: Pair) -> list[int]:
    return pair.first if pair.label > 0.5 else pair.second


def _rejected(pair: Pair) -> list[int]:
    return pair.second if pair.label > 0.5 else pair.first


def _dpo_rows(roles: Roles, pairs: Sequence[Pair]) -> datasets.Dataset:
    chosen = _reference_logprobs(roles, [(pair.prompt, _chosen(pair)) for pair in pairs])
    rejected = _reference_logprobs(roles, [(pair.prompt, _rejected(pair)) for pair in pairs])
    rows = [
        {
            "prompt_ids": pair.prompt,
            "chosen_ids": _chosen(pair),
            "rejected_ids": _rejected(pair),
            "ref_chosen_logps": of_chosen,
            "ref_rejected_logps": of_rejected,
        }
        for pair, of_chosen, of_rejected in zip(pairs, chosen, rejected, strict=True)
    ]
    return datasets.Dataset.from_list(rows)


@torch.no_grad()
def _reference_logprobs(
    roles: Roles, sequences: Sequence[tuple[list[int], list[int]]], batch_size: int = 64
) -> list[float]:
    """[N] log-probability of each whole reply by the anchor."""
    found: list[float] = []
    for start in range(0, len(sequences), batch_size):
        batch = roles.batch(sequences[start : start + batch_size])
        found += roles.logprobs(batch, role=REFERENCE).sum(1).tolist()
    return found


def _orpo_rows(pairs: Sequence[Pair]) -> datasets.Dataset:
    rows = []
    for pair in pairs:
        row: dict[str, list[int]] = {}
        for name, reply in (("prompt", []), ("chosen", _chosen(pair)), ("rejected", _rejected(pair))):
            row[f"{name}_input_ids"] = pair.prompt + reply
            row[f"{name}_attention_mask"] = [1] * (len(pair.prompt) + len(reply))
            row[f"{name}_labels"] = [-100] * len(pair.prompt) + reply
        rows.append(row)
    return datasets.Dataset.from_list(rows)


@dataclass(slots=True)
class _Watch(TrainerCallback):  # type: ignore[misc]
    """Looks at the policy after every stretch, and ends the run."""

    run: PreferenceRun
    checkpoints: Path
    on_iteration: Callable[[Iteration], None]
    stretch: int
    """Optimiser steps between two looks."""
    guard: GuardWatch | None
    iterations: list[Iteration] = field(default_factory=list)
    why: str = ALL_DONE

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """TRL calls it after each optimiser step."""
        if state.global_step % self.stretch == 0:
            control.should_training_stop = self.look()

    def look(self) -> bool:
        """Keeps a checkpoint and measures it. Returns whether the run should end."""
        roles, scoring, number = self.run.roles, self.run.scoring, len(self.iterations)
        keep_checkpoint(roles, checkpoint_path(self.checkpoints, number))
        model = roles.model.get_base_model()
        training = model.training
        roles.eval()
        self.iterations.append(replace(self._measure(number), guard=guarded(self.guard, number)))
        model.train(training)
        self.on_iteration(self.iterations[-1])
        if why := objection(self.iterations):
            self.why = why
            return True
        if self.iterations[-1].kl >= scoring.kl_budget:
            self.why = "the KL budget was spent"
            return True
        return False

    def _measure(self, number: int) -> Iteration:
        """On the same prompts with the same random numbers each time, so that iterations differ by their policies alone."""
        run, scoring = self.run, self.run.scoring
        roles = run.roles
        prompts = random.Random(run.seed).choices(run.prompts, k=scoring.rollouts)
        generator = torch.Generator(device=roles.device).manual_seed(run.seed)
        sampler = Sampler(
            roles.end_ids, scoring.max_tokens, scoring.temperature, context_tokens=roles.context_tokens
        )
        with roles.acting_as(POLICY):
            rollouts = sampler.sample(roles.model, prompts, generator)
        return measure(number, roles, run.ensemble, run.judge, rollouts, scoring, run.settings.beta)
