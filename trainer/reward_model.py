"""Reward models: the policy's architecture with a scalar head, fit to votes with -log sigmoid(r_chosen - r_rejected).

The head reads the anchor: the mean of its hidden states over the reply, and how likely it found the reply (a right answer
is a likely one, also to a model that often says the wrong one). The anchor's weights stay as they are, so fitting is convex,
takes a second, and is the same every time; a few hundred votes cannot do better by bending features.

Heads come as an ensemble, each fit on a bootstrap of the training votes, so that their disagreement says where they guess; and as
a judge, fit on held-out votes that the ensemble never sees. Sources: arXiv:2203.02155 (eq. 1), arXiv:2310.02743 (ensembles).

Legend: B sequences, L tokens, H hidden size, F = H + 4 features, N pairs.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainer.models import Batch, Reading, Roles

NUM_LIKELIHOODS = 4
LIKELIHOOD_PRIOR = 3.0
"""How much less the likelihood features are shrunk than the hidden ones: they are few, and known to matter."""
RIDGES = (0.03, 0.1, 0.3, 1.0)
"""Strengths of the penalty on weights that cross-validation chooses from."""


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

    members: int = 8
    """Heads in the ensemble."""
    held_out: float = 0.2
    """Share of prompts whose votes the ensemble never sees."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of decided pairs that a model orders as the user did, with a 95 % interval (Wilson)."""

    share: float
    low: float
    high: float
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Head:
    """One or more scalar heads on standardised features."""

    scale: Tensor
    """[F] what each feature is divided by."""
    weight: Tensor
    """[F, K] one column a head."""
    offset: Tensor
    """[K] mean of the raw score over the anchor's own replies."""
    spread: Tensor
    """[K] its standard deviation there."""

    def __call__(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, K] scores, mean 0 and standard deviation 1 over the anchor's replies."""
        return ((features / self.scale) @ self.weight - self.offset) / self.spread


def reward_features(reading: Reading, mask: Tensor) -> Tensor:
    """[B, F]: mean hidden state over the reply; sum, mean and least of its log-probabilities; its length. mask: (B, L)."""
    length = mask.sum(1, keepdim=True).clamp(min=1)
    states = (reading.states * mask[..., None]).sum(1) / length
    total = reading.logprobs.sum(1, keepdim=True)
    least = reading.logprobs.min(1, keepdim=True).values
    return torch.cat([states, total, total / length, least, length], dim=1)


@torch.no_grad()
def read_features(
    roles: Roles, sequences: Sequence[tuple[list[int], list[int]]], batch_size: int = 128
) -> Tensor:
    """[N, F] of (prompt ids, reply ids), in the order given; batched by length."""
    order = sorted(range(len(sequences)), key=lambda index: sum(map(len, sequences[index])))
    rows: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        chosen = [sequences[index] for index in order[start : start + batch_size]]
        batch = Batch.collate(chosen, roles.pad_id, roles.device)
        rows.append(reward_features(roles.read(batch), batch.reply_mask))
    features = torch.cat(rows)
    return torch.empty_like(features).index_copy_(0, torch.tensor(order, device=features.device), features)


def pair_loss(margin: Tensor, label: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected), a tie as the mean of both directions.

    margin: (N,) r_first - r_second; label: (N,) probability that the first is better. Returns a scalar.
    """
    return functional.binary_cross_entropy_with_logits(margin, label)


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; all votes on one prompt fall on the same side."""
    groups = sorted({pair.group for pair in pairs})
    random.Random(seed).shuffle(groups)
    held = set(groups[: math.ceil(len(groups) * share)])
    return [pair for pair in pairs if pair.group not in held], [pair for pair in pairs if pair.group in held]


def fit(roles: Roles, pairs: Sequence[Pair], own_features: Tensor, members: int, seed: int) -> Head:
    """`members` heads on the pairs: one on all of them, or each on a bootstrap of their groups.

    own_features: (M, F) of replies sampled from the anchor, which the scores are scaled to.
    """
    first = read_features(roles, [(pair.prompt, pair.first) for pair in pairs])
    second = read_features(roles, [(pair.prompt, pair.second) for pair in pairs])
    label = torch.tensor([pair.label for pair in pairs], device=first.device)
    scale = torch.cat([first, second]).std(0).clamp(min=1e-6)
    scale[-NUM_LIKELIHOODS:] /= LIKELIHOOD_PRIOR
    margins = (first - second) / scale
    groups = [pair.group for pair in pairs]
    ridge = _choose_ridge(margins, label, groups, seed)
    rng = random.Random(seed)
    draws = [_bootstrap(groups, rng) if members > 1 else list(range(len(pairs))) for _ in range(members)]
    weight = torch.stack([_fit_weights(margins[draw], label[draw], ridge) for draw in draws], dim=1)
    raw = (own_features / scale) @ weight
    return Head(scale, weight, raw.mean(0), raw.std(0).clamp(min=1e-6))


def _bootstrap(groups: Sequence[str], rng: random.Random) -> list[int]:
    """Indices of pairs, whole groups drawn with replacement."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    names = sorted(members)
    return [index for name in rng.choices(names, k=len(names)) for index in members[name]]


def _choose_ridge(margins: Tensor, label: Tensor, groups: Sequence[str], seed: int, folds: int = 5) -> float:
    """The strength with the least loss in cross-validation by group."""
    names = sorted(set(groups))
    random.Random(seed).shuffle(names)
    fold_of = {name: index % folds for index, name in enumerate(names)}
    fold = torch.tensor([fold_of[group] for group in groups], device=margins.device)
    losses = dict.fromkeys(RIDGES, 0.0)
    for ridge in RIDGES:
        for number in range(folds):
            test = fold == number
            if test.any() and not test.all():
                weights = _fit_weights(margins[~test], label[~test], ridge)
                losses[ridge] += pair_loss(margins[test] @ weights, label[test]).item() * int(test.sum())
    return min(losses, key=lambda ridge: losses[ridge])


def _fit_weights(margins: Tensor, label: Tensor, ridge: float) -> Tensor:
    """(F,) the minimum of pair_loss + ridge * |w|^2. margins: (N, F)."""
    weights = torch.zeros(margins.shape[1], device=margins.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = pair_loss(margins @ weights, label) + ridge * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def measure_accuracy(roles: Roles, head: Head, pairs: Sequence[Pair]) -> Accuracy:
    """Of the heads' mean score on decided pairs (ties say nothing here)."""
    decided = [pair for pair in pairs if pair.label != 0.5]
    if not decided:
        return Accuracy(0.0, 0.0, 1.0, 0)
    first = head(read_features(roles, [(pair.prompt, pair.first) for pair in decided])).mean(1)
    second = head(read_features(roles, [(pair.prompt, pair.second) for pair in decided])).mean(1)
    label = torch.tensor([pair.label for pair in decided], device=first.device)
    right = int(((first > second) == (label > 0.5)).sum())
    low, high = wilson(right, len(decided))
    return Accuracy(right / len(decided), low, high, len(decided))


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share. Returns (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return centre - half, centre + half
