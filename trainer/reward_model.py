"""Reward models: the policy's architecture with a scalar head, fit to votes with -log sigmoid(r_chosen - r_rejected).

An ensemble, each on its own share of the training votes, so that their disagreement says where they guess; and a judge,
fit on held-out votes that the ensemble never sees. Source: arXiv:2203.02155, eq. 1; ensemble: arXiv:2310.02743.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainer.models import Batch, Roles


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt as token ids, and how the user judged them."""

    prompt: list[int]
    first: list[int]
    second: list[int]
    label: float
    """Probability that the first is better: 1.0, 0.0, or 0.5 for a tie."""
    group: str
    """What may not be split between training and held-out: the prompt's identity."""


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """How reward models are fit."""

    epochs: int = 3
    batch_size: int = 32
    """Pairs in a step."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    """Share of labels taken to be noise."""
    members: int = 4
    """Reward models in the ensemble."""
    held_out: float = 0.2
    """Share of prompts whose votes the ensemble never sees."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of decided pairs that a model orders as the user did, with a 95 % interval (Wilson)."""

    share: float
    low: float
    high: float
    num_pairs: int


def pair_loss(first: Tensor, second: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected), ties as the mean of both directions. All (B,). Returns a scalar."""
    target = label * (1 - smoothing) + 0.5 * smoothing
    return functional.binary_cross_entropy_with_logits(first - second, target)


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; all votes on one prompt fall on the same side."""
    groups = sorted({pair.group for pair in pairs})
    random.Random(seed).shuffle(groups)
    held = set(groups[: math.ceil(len(groups) * share)])
    return [pair for pair in pairs if pair.group not in held], [pair for pair in pairs if pair.group in held]


def score_pairs(roles: Roles, role: str, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores of the first and of the second replies, each (pairs,), with gradients where they are on."""
    sequences = [(p.prompt, p.first) for p in pairs] + [(p.prompt, p.second) for p in pairs]
    scores = roles.scores(role, Batch.collate(sequences, roles.pad_id, roles.device))
    return scores[: len(pairs)], scores[len(pairs) :]


def fit(
    roles: Roles,
    role: str,
    pairs: Sequence[Pair],
    settings: RewardSettings,
    seed: int,
    progress: Callable[[], None] | None = None,
) -> None:
    """Makes the role and fits it to the pairs."""
    roles.add_scalar_role(role, seed)
    parameters = roles.parameters_of(role)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    rng = random.Random(seed)
    order = list(pairs)
    steps = settings.epochs * math.ceil(len(order) / settings.batch_size)
    step = 0
    for _ in range(settings.epochs):
        rng.shuffle(order)
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, (step + 1) / 5) * (1 - step / steps)
            first, second = score_pairs(roles, role, batch)
            label = torch.tensor([pair.label for pair in batch], device=first.device)
            pair_loss(first, second, label, settings.label_smoothing).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if progress:
                progress()


@torch.no_grad()
def measure_accuracy(roles: Roles, role_names: Sequence[str], pairs: Sequence[Pair]) -> Accuracy:
    """Of the mean score of the roles on decided pairs (ties say nothing here)."""
    decided = [pair for pair in pairs if pair.label != 0.5]
    margins = torch.zeros(len(decided))
    for role in role_names:
        for start in range(0, len(decided), 128):
            first, second = score_pairs(roles, role, decided[start : start + 128])
            margins[start : start + 128] += (first - second).cpu()
    right = sum((margin > 0) == (pair.label > 0.5) for margin, pair in zip(margins.tolist(), decided, strict=True))
    low, high = wilson(right, len(decided))
    return Accuracy(right / max(1, len(decided)), low, high, len(decided))


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share. Returns (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return centre - half, centre + half
