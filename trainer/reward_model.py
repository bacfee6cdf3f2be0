"""Reward models: the policy's architecture with a scalar head, fit to votes with -log sigmoid(r_chosen - r_rejected).

The head reads what the anchor makes of a reply (`features.py`). The anchor's weights stay as they are, so fitting is convex, takes a
second, and is the same every time; a few hundred votes cannot do better by bending features.

Heads come as an ensemble, each fit on a bootstrap of the training votes, so that their disagreement says where they guess; and as
a judge, fit on held-out votes that the ensemble never sees. Sources: arXiv:2203.02155 (eq. 1), arXiv:2310.02743 (ensembles).

Legend: B sequences, L tokens, F features, N comparisons (pairs, and disliked replies against the anchor's
average one), K heads.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainer.features import AGREEMENT, NUM_PLAIN, read_features
from trainer.models import Roles
from trainer.preferences import Preferences

PLAIN_PRIOR = 2.0
"""How much less surprise and agreement are shrunk than the others: they are few, and known to matter."""
LENGTH_PRIOR = 6.0
"""The same of length: where it matters, votes on long replies tell what a short one gains, which its few words cannot."""
STATES_PRIOR = 0.5
"""How much more the mean hidden states are shrunk than the words: there are as many, and on their own they say less. On votes that
were not fit to (3 tastes, 3 times 330 votes) the loss is .4189 with this and the mean below, .4279 with 1.0 and 0.2."""
PLAIN_MEAN = 0.1
"""Weight of surprise (with its minus) and agreement that the penalty pulls towards; of all else 0.0. With no votes to tell, what the
anchor expects, and says when it is surest, is rather right."""
LEAST_SPREAD = 0.1
"""Of agreement, which is 1.0 for a right answer: less is taken for this, lest what hardly varies is blown up."""
RIDGES = (0.03, 0.1, 0.3, 1.0)
"""Strengths of the penalty on weights that cross-validation chooses from."""


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """How reward models are fit."""

    members: int = 32
    """Heads in the ensemble."""
    held_out: float = 0.2
    """Share of the votes that the ensemble never sees."""
    label_smoothing: float = 0.0
    """Share of votes that are taken to be turned round (arXiv:2403.00409)."""
    length_bias: bool = True
    """Whether the score may grow with length; False takes out what it owes to it over the anchor's replies."""


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
    sharpness: float = 1.0
    """What a margin of raw scores is multiplied by to be a log-odds: from cross-validation."""

    def __call__(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, K] scores, mean 0 and standard deviation 1 over the anchor's replies."""
        return ((features / self.scale) @ self.weight - self.offset) / self.spread

    def probability(self, first: Tensor, second: Tensor) -> Tensor:
        """[N] that the first is preferred, by the heads' mean. first, second: (N, F)."""
        margin = ((first - second) / self.scale) @ self.weight
        return torch.sigmoid(self.sharpness * margin.mean(1))


def pair_loss(margin: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected), a tie as the mean of both directions; the mean by weight.

    margin: (N,) r_first - r_second; label: (N,) probability that the first is better; weight: (N,). Returns a scalar.
    """
    losses = functional.binary_cross_entropy_with_logits(margin, label, reduction="none")
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def fit(
    roles: Roles,
    preferences: Preferences,
    own_features: Tensor,
    settings: RewardSettings,
    members: int,
    seed: int,
) -> Head:
    """`members` heads on the preferences: one on all of them, or each on a bootstrap of their prompts.

    own_features: (M, F) of replies sampled from the anchor, which the scores are scaled to, and which a disliked reply is
    taken to be worse than.
    """
    pairs, dislikes = preferences.pairs, preferences.dislikes
    first = read_features(roles, [(pair.prompt, pair.first) for pair in pairs])
    second = read_features(roles, [(pair.prompt, pair.second) for pair in pairs])
    # With the anchor's own replies: what those that were voted on all have alike must not count for more than all that votes say.
    scale = torch.cat([first, second, own_features]).std(0).clamp(min=1e-6)
    # One for all of the words: where some hardly vary they are rare, and would be blown up.
    scale[: roles.hidden_size] = scale[: roles.hidden_size].square().mean().sqrt()
    scale[AGREEMENT] = scale[AGREEMENT].clamp(min=LEAST_SPREAD)
    scale[-NUM_PLAIN:-1] /= PLAIN_PRIOR
    scale[-1] /= LENGTH_PRIOR
    scale[roles.hidden_size : 2 * roles.hidden_size] /= STATES_PRIOR
    disliked = read_features(roles, [(each.prompt, each.reply) for each in dislikes])
    margins = torch.cat([first - second, disliked - own_features.mean(0)]) / scale
    labels = [pair.label for pair in pairs] + [0.0] * len(dislikes)
    smoothing = settings.label_smoothing
    label = torch.tensor([smoothing + (1 - 2 * smoothing) * value for value in labels], device=first.device)
    weight = torch.tensor([each.weight for each in preferences.everything], device=first.device)
    groups = [source.group for source in preferences.sources]
    ridge, sharpness = _cross_validate(margins, label, weight, groups, seed)
    rng = random.Random(seed)
    draws = [_bootstrap(groups, rng) if members > 1 else list(range(len(groups))) for _ in range(members)]
    heads = torch.stack(
        [_fit_weights(margins[draw], label[draw], weight[draw], ridge) for draw in draws], dim=1
    )
    if not settings.length_bias:
        heads = _without_length(heads, own_features / scale)
    raw = (own_features / scale) @ heads
    return Head(scale, heads, raw.mean(0), raw.std(0).clamp(min=1e-6), sharpness)


def _without_length(heads: Tensor, features: Tensor) -> Tensor:
    """Heads whose scores have no linear dependence on length, the last feature, over these. features: (M, F)."""
    length = features[:, -1] - features[:, -1].mean()
    slope = (length[:, None] * (features @ heads)).sum(0) / length.square().sum().clamp(min=1e-6)
    heads = heads.clone()
    heads[-1] -= slope
    return heads


def _bootstrap(groups: Sequence[str], rng: random.Random) -> list[int]:
    """Indices of pairs, whole groups drawn with replacement."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    names = sorted(members)
    return [index for name in rng.choices(names, k=len(names)) for index in members[name]]


def _cross_validate(
    margins: Tensor, label: Tensor, weight: Tensor, groups: Sequence[str], seed: int, folds: int = 5
) -> tuple[float, float]:
    """The ridge with the least loss in cross-validation by prompt, and the sharpness that is right for it.

    Margins shrunk by a ridge are too timid, and those of few votes too bold: held-out folds say by how much. Ties have no say in it:
    a probability is of which reply is preferred, where one is.
    """
    decided = label != 0.5
    names = sorted(set(groups))
    random.Random(seed).shuffle(names)
    fold_of = {name: index % folds for index, name in enumerate(names)}
    fold = torch.tensor([fold_of[group] for group in groups], device=margins.device)
    best = (math.inf, RIDGES[-1], 1.0)
    for ridge in RIDGES:
        unseen = torch.zeros_like(label)
        for number in range(folds):
            test = fold == number
            if test.any() and not test.all():
                unseen[test] = margins[test] @ _fit_weights(
                    margins[~test], label[~test], weight[~test], ridge
                )
        loss = pair_loss(unseen, label, weight).item()
        if loss < best[0]:
            sharpness = _fit_sharpness(unseen[decided], label[decided], weight[decided])
            best = (loss, ridge, sharpness)
    return best[1:]


def _fit_sharpness(margin: Tensor, label: Tensor, weight: Tensor) -> float:
    """What to multiply margins by so that they are log-odds; between a tenth and ten."""
    candidates = torch.logspace(-1, 1, 81)
    losses = torch.stack([pair_loss(float(by) * margin, label, weight) for by in candidates])
    return float(candidates[int(losses.argmin())])


def _fit_weights(margins: Tensor, label: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """(F,) the minimum of pair_loss + ridge * |w - prior|^2. margins: (N, F)."""
    prior = torch.zeros(margins.shape[1], device=margins.device)
    prior[-NUM_PLAIN:-1] = PLAIN_MEAN  # the last one is the length
    weights = prior.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = pair_loss(margins @ weights, label, weight) + ridge * (weights - prior).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()
