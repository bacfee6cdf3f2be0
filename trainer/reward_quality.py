"""How good a reward model is, on judgements that it has not seen: accuracy, calibration, for whom, and whether it likes length.

Legend: N decided pairs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.intervals import wilson
from trainer.features import read_features
from trainer.models import Roles
from trainer.preferences import Pair
from trainer.reward_model import Head

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of decided pairs that a model orders as the user did, with a 95 % interval (Wilson)."""

    share: float
    low: float
    high: float
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Of the reliability curve: pairs that the model was about as sure of."""

    confidence: float
    """Mean probability that the model gave to the reply it preferred."""
    accuracy: float
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Quality:
    """Everything that is reported of a reward model."""

    accuracy: Accuracy
    log_loss: float
    """Mean -log of the probability that it gave to what the user preferred; 0.693 is a coin's."""
    calibration_error: float
    """Expected calibration error: mean distance between confidence and accuracy, by bins of equal width (arXiv:1706.04599)."""
    reliability: list[Bin]
    by_policy: dict[str, Accuracy]
    """Of pairs with a reply by that policy."""
    by_cohort: dict[str, Accuracy]
    length_correlation: float
    """Pearson's, of score and length in tokens, over the replies of these pairs."""


@torch.no_grad()
def measure(roles: Roles, head: Head, pairs: Sequence[Pair]) -> Quality:
    """On the decided ones of these pairs (ties say nothing of order)."""
    decided = [pair for pair in pairs if pair.decided]
    first = read_features(roles, [(pair.prompt, pair.first) for pair in decided])
    second = read_features(roles, [(pair.prompt, pair.second) for pair in decided])
    probability = head.probability(first, second).double()
    label = torch.tensor([pair.label for pair in decided], device=probability.device, dtype=torch.float64)
    right = ((probability > 0.5) == (label > 0.5)).tolist()
    of_chosen = torch.where(label > 0.5, probability, 1 - probability).clamp(min=1e-12)
    confidence = torch.maximum(probability, 1 - probability).tolist()
    features = torch.cat([first, second])
    return Quality(
        accuracy=_accuracy(right),
        log_loss=-of_chosen.log().mean().item() if decided else math.nan,
        calibration_error=calibration_error(confidence, right),
        reliability=_reliability(confidence, right),
        by_policy=_by(((policy for policy in pair.source.policies if policy) for pair in decided), right),
        by_cohort=_by(((pair.source.cohort,) for pair in decided), right),
        length_correlation=_correlation(head(features).mean(1), features[:, -1]),
    )


def calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """Mean distance between confidence and accuracy, by bins of equal width (ECE); 0.0 of none."""
    bins = _reliability(confidence, right)
    return sum(abs(b.confidence - b.accuracy) * b.num_pairs for b in bins) / max(1, len(right))


def _reliability(confidence: Sequence[float], right: Sequence[bool]) -> list[Bin]:
    """Bins of equal width from .5 to 1; empty ones are left out."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for sure, hit in zip(confidence, right, strict=True):
        index = min(NUM_BINS - 1, int((sure - 0.5) * 2 * NUM_BINS))
        members.setdefault(index, []).append((sure, hit))
    return [
        Bin(
            confidence=sum(sure for sure, _ in found) / len(found),
            accuracy=sum(hit for _, hit in found) / len(found),
            num_pairs=len(found),
        )
        for _, found in sorted(members.items())
    ]


def _by(names: Iterable[Iterable[str]], right: Sequence[bool]) -> dict[str, Accuracy]:
    members: dict[str, list[bool]] = {}
    for mine, hit in zip(names, right, strict=True):
        for name in sorted(set(mine)):
            members.setdefault(name, []).append(hit)
    return {name: _accuracy(found) for name, found in sorted(members.items())}


def _accuracy(right: Sequence[bool]) -> Accuracy:
    low, high = wilson(sum(right), len(right))
    return Accuracy(sum(right) / len(right) if right else 0.0, low, high, len(right))


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's; 0.0 where one of the two does not vary."""
    one, other = (one - one.mean()).double(), (other - other.mean()).double()
    scale = (one.norm() * other.norm()).item()
    return (one @ other).item() / scale if scale > 1e-12 else 0.0
