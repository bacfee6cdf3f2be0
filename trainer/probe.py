"""A policy's probe: a few of its own replies with the log-probability of each of their tokens, and how far an engine may be off.

An engine that holds the right weights still computes other numbers: it rounds every result to its own dtype, in another order. How
much that changes these very log-probabilities is measured here, by stochastic arithmetic (D. S. Parker, 1997, Monte Carlo
Arithmetic, UCLA CSD-970002): the probe is computed again and again with every module's result off by a random part of that
dtype's unit roundoff. The tolerance follows from what is measured, by `tolerance`.

Used by `publish.py`; the service verifies by it (`service/fleet.py`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.fleet import MAX_PROBED_TOKENS
from trainer.models import REFERENCE, Batch, Roles
from trainer.rollouts import Rollout

NUM_PROBES = 4
NUM_REPEATS = 8
ENGINE_DTYPE = torch.bfloat16
"""As `service/engine_process.py` starts engines."""
SIDES = 2.0
"""Engine and trainer may both have rounded so: their errors add up at most."""
DEVIATIONS = 4.0
"""Standard deviations that are left to chance: it goes beyond once in 30,000 times, were it normal."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What rounding to `dtype` makes of the probe, in nats a token, mean absolute."""

    dtype: str
    unit_roundoff: float
    repeats: int
    mean: float
    """Over repeats and tokens."""
    deviation: float
    """Standard deviation of one verification's mean: between repeats, and by which tokens it looks at."""
    distance: float
    """Of the base's log-probabilities from the policy's: how far off an engine would be that answers with stale weights."""


def choose(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The longest replies."""
    return sorted(rollouts, key=lambda rollout: len(rollout.reply_ids))[-NUM_PROBES:]


@torch.no_grad()
def make_probes(roles: Roles, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """The tokens of each with the log-probability of each of the reply's; null for the prompt's."""
    probes = []
    for rollout in rollouts:
        logprobs = roles.logprobs(_batch(roles, rollout))[0].tolist()
        start = len(rollout.prompt_ids)
        probes.append(
            {
                "token_ids": rollout.prompt_ids + rollout.reply_ids,
                "logprobs": [None] * start + logprobs[start:],
            }
        )
    return probes


@torch.no_grad()
def measure_noise(roles: Roles, rollouts: Sequence[Rollout]) -> Noise:
    """By so many computations of these replies with results that are off by chance; the same ones every time."""
    plain = _reply_logprobs(roles, rollouts)
    roundoff = torch.finfo(ENGINE_DTYPE).eps / 2
    generator = torch.Generator(roles.device).manual_seed(0)
    with _rounding(roles.model, roundoff, generator):
        repeats = [_reply_logprobs(roles, rollouts) for _ in range(NUM_REPEATS)]
    gaps = torch.stack([(repeat - plain).abs() for repeat in repeats])  # (repeats, tokens)
    num_probed = min(gaps.shape[1], MAX_PROBED_TOKENS)
    spread = gaps.mean(1).var() + gaps.mean(0).var(unbiased=False) / num_probed
    with roles.acting_as(REFERENCE):
        base = torch.cat([_of_reply(roles.read(_batch(roles, each)).logprobs, each) for each in rollouts])
    return Noise(
        dtype=str(ENGINE_DTYPE).removeprefix("torch."),
        unit_roundoff=roundoff,
        repeats=NUM_REPEATS,
        mean=gaps.mean().item(),
        deviation=math.sqrt(spread.item()),
        distance=(base - plain).abs().mean().item(),
    )


def tolerance(noise: Noise) -> float:
    """Nats a token that a right engine stays within: what rounding does on average, and by chance, on both sides."""
    return max(noise.unit_roundoff, SIDES * (noise.mean + DEVIATIONS * noise.deviation))


def _batch(roles: Roles, rollout: Rollout) -> Batch:
    return Batch.collate([(rollout.prompt_ids, rollout.reply_ids)], roles.pad_id, roles.device)


def _reply_logprobs(roles: Roles, rollouts: Sequence[Rollout]) -> Tensor:
    """(tokens,) of all replies, one after the other."""
    return torch.cat([_of_reply(roles.logprobs(_batch(roles, each)), each) for each in rollouts])


def _of_reply(logprobs: Tensor, rollout: Rollout) -> Tensor:
    return logprobs[0, len(rollout.prompt_ids) :].float()


@contextmanager
def _rounding(model: nn.Module, roundoff: float, generator: torch.Generator) -> Iterator[None]:
    """Within it the result of every module, small or large, is off by up to `roundoff` of itself."""

    def disturb(_: nn.Module, __: tuple[Any, ...], result: object) -> object:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        chance = torch.rand(result.shape, generator=generator, device=result.device) * 2 - 1
        return (result.float() * (1 + roundoff * chance)).to(result.dtype)

    hooks = [module.register_forward_hook(disturb) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
