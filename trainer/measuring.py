"""What a policy's own replies look like, in the numbers of an `Iteration`, for methods that have no rollouts to learn from.

Legend: B sequences, L tokens of prompt and reply, N replies, K heads of the ensemble, J of the judge.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer import ppo_math
from trainer.features import reward_features
from trainer.iterations import Iteration
from trainer.microbatch import Microbatch, disagreement, sampled_logprobs
from trainer.models import Roles
from trainer.ppo import PPOSettings, pessimistic
from trainer.repetition import repeats
from trainer.reward_model import Head
from trainer.rollouts import Rollout


@torch.no_grad()
def measure(
    number: int,
    roles: Roles,
    ensemble: Head,
    judge: Head,
    rollouts: Sequence[Rollout],
    scoring: PPOSettings,
    kl_coefficient: float,
) -> Iteration:
    """Of replies that the policy in `roles` has just sampled. `clipped` and `value_explained`, which only PPO has, are 0.0.

    scoring: how replies were sampled, and what faults cost. Raises ValueError without replies.
    """
    if not rollouts:
        raise ValueError("There are no replies to measure.")
    ordered = sorted(rollouts, key=lambda rollout: len(rollout.prompt_ids) + len(rollout.reply_ids))
    size = scoring.microbatch
    facts: dict[str, list[Tensor]] = {}
    for start in range(0, len(ordered), size):
        part = _read(roles, ensemble, judge, ordered[start : start + size], scoring)
        for name, values in _facts(part, scoring).items():
            facts.setdefault(name, []).append(values)
    columns = {name: torch.cat(parts) for name, parts in facts.items()}
    means = {name: column.mean().item() for name, column in columns.items()}
    num_replies = len(rollouts)
    spread = columns["judge"].mean(1).std().item() if num_replies > 1 else 0.0
    return Iteration(
        number=number,
        score=means["score"],
        judge=means["judge"],
        judge_error=spread / math.sqrt(num_replies),
        judges=tuple(columns["judge"].mean(0).tolist()),
        disagreement=means["disagreement"],
        kl=means["kl"],
        kl_coefficient=kl_coefficient,
        entropy=means["surprise"] / means["length"],
        length=means["length"],
        ended=means["ended"],
        repeated=means["repeated"],
        clipped=0.0,
        value_explained=0.0,
        gap=means["gap"] / means["length"],
    )


def _read(
    roles: Roles, ensemble: Head, judge: Head, rollouts: Sequence[Rollout], scoring: PPOSettings
) -> Microbatch:
    """A microbatch as PPO's, but for what only its update needs, which stays empty."""
    batch = roles.batch([(r.prompt_ids, r.reply_ids) for r in rollouts])
    reading = roles.read(batch, scoring.temperature)
    reward = reward_features(reading, batch.reply_mask)
    repeated = [float(repeats(roles.decode(rollout.reply_ids))) for rollout in rollouts]
    empty = torch.zeros_like(batch.reply_mask)
    return Microbatch(
        batch=batch,
        old=roles.logprobs(batch, scoring.temperature, lower=reading.lower),
        sampled=sampled_logprobs(batch, rollouts),
        reference=reading.logprobs,
        lower=None,
        features=empty,
        values=empty,
        scores=ensemble(reward),
        judged=judge(reward),
        ended=torch.tensor([float(rollout.ended) for rollout in rollouts], device=batch.ids.device),
        repeated=torch.tensor(repeated, device=batch.ids.device),
        advantages=empty,
        returns=empty,
    )


def _facts(part: Microbatch, scoring: PPOSettings) -> dict[str, Tensor]:
    """[B] each, but for the judge's [B, J]: sums over a reply's tokens, or facts of the whole reply."""
    return {
        "score": pessimistic(part, scoring),
        "judge": part.judged,
        "disagreement": disagreement(part),
        "kl": (ppo_math.kl_k3(part.old, part.reference) * part.mask).sum(1),
        "surprise": -part.old.sum(1),
        "gap": ppo_math.gaps(part.old, part.sampled, part.mask).sum(1),
        "length": part.mask.sum(1),
        "ended": part.ended,
        "repeated": part.repeated,
    }
