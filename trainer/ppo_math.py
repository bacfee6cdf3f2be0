"""The arithmetic of PPO, as pure functions on tensors. Nothing here knows of models, files or loops.

Legend: B sequences, L tokens; `mask` (B, L) is 1.0 at reply tokens. Reply tokens of a sequence are contiguous and its last
one carries the score. Every result is 0.0 where the mask is.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def own(part: Tensor) -> Tensor:
    """The total of a part that is the whole."""
    return part


def masked_mean(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = own) -> Tensor:
    """Mean over real tokens. values, mask: (B, L). Returns a scalar. total: sums over parts that others hold."""
    return total((values * mask).sum()) / total(mask.sum())


def whiten(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = own) -> Tensor:
    """Zero mean and unit variance over real tokens only. values, mask: (B, L). total: as in `masked_mean`."""
    mean = masked_mean(values, mask, total)
    variance = masked_mean((values - mean) ** 2, mask, total)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log p - log q on samples from p: unbiased, may be negative; used in the reward. Source: Schulman, "Approximating KL"."""
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(q/p - 1) - log(q/p) on samples from p: unbiased, never negative, less variance; used to report. Source: as k1."""
    log_ratio = reference - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(
    scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coefficient: float
) -> Tensor:
    """-kl_coefficient * k1 at each reply token, and the score on the last real one.

    scores: (B,), logprobs, reference, mask: (B, L). Returns (B, L). Source: arXiv:2203.02155, eq. 2.
    """
    rewards = -kl_coefficient * kl_k1(logprobs, reference) * mask
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * (mask > 0)).argmax(dim=1)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation. rewards, values, mask: (B, L). Returns advantages and returns: (B, L).

    values[:, i] is the value before token i is chosen. After the last reply token the value is 0. Source: arXiv:1506.02438, eq. 16.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    for step in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, step] + discount * next_value - values[:, step]
        running = (delta + discount * trace * running) * mask[:, step]  # padding to the right resets it to 0
        next_value = values[:, step] * mask[:, step]
        advantages[:, step] = running
    return advantages, (advantages + values) * mask


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, below: float, above: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate. All (B, L). Returns (B, L) losses per token, and the (B, L) flags of clipped tokens.

    below, above: how far from 1 a ratio may go either way. Source: arXiv:1707.06347, eq. 7; apart: arXiv:2503.14476, section 3.1.
    """
    ratio = torch.exp((logprobs - old) * mask)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - below, 1 + above)
    return torch.maximum(unclipped, clipped) * mask, (clipped > unclipped).float() * mask


def importance_weights(logprobs: Tensor, sampled: Tensor, mask: Tensor, most: float) -> Tensor:
    """min(p / q, most) for each token that q drew and p is to learn from: truncated, since one unlikely token would outweigh the rest.

    logprobs, by p, and sampled, by q, of the drawn tokens; mask: (B, L). Returns (B, L), which no gradient goes through.

    Source: arXiv:1802.01561, section 4.1 (the weights rho_t).
    """
    return torch.exp((logprobs.detach() - sampled) * mask).clamp(max=most) * mask


def gaps(logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
    """|log p - log q| of each token, nats: how far off whoever drew it is. Arguments and result as those of `importance_weights`."""
    return (logprobs - sampled).abs() * mask


def adapt_kl_coefficient(coefficient: float, kl: float, target: float) -> float:
    """The coefficient for the next iteration: up to twice itself where KL is above its target, down by up to 10 % where below.

    Slow to loosen, quick to tighten: KL answers a step late, and an overshoot is dear.

    Source: arXiv:1909.08593, section 2.2 (a proportional controller in log space).
    """
    error = max(-0.1, min(1.0, kl / target - 1.0))
    return coefficient * (1.0 + error)
