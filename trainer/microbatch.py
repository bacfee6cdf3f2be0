"""Some rollouts of like length, with all that PPO's update needs of them. For `ppo.py`, and `measuring.py`, which updates nothing.

Legend: B sequences, L tokens of prompt and reply, H hidden size, K heads of the ensemble, J of the judge, G value features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer import ppo_math
from trainer.batches import Batch
from trainer.rollouts import Rollout
from trainer.team import ALONE, Team


@dataclass(slots=True)
class Microbatch:
    """Rollouts of like length, with all that the update needs. Tensors are (B, L) unless said."""

    batch: Batch
    old: Tensor
    """The policy's log-probabilities when it sampled, by the pass that trains, or by one that rounds as it does."""
    sampled: Tensor
    """The same by whoever sampled."""
    reference: Tensor
    lower: Tensor | None
    """[B, L, H] as in `Reading`."""
    features: Tensor
    """[B, L, G] value features."""
    values: Tensor
    scores: Tensor
    """[B, K] by the ensemble."""
    judged: Tensor
    """[B, J] by the judge's heads."""
    ended: Tensor
    """[B] 1.0 where the reply ended by itself."""
    repeated: Tensor
    """[B] 1.0 where the reply says a run of words twice."""
    advantages: Tensor
    returns: Tensor

    @property
    def trusted(self) -> bool:
        """Whether the sampler's word is taken for `old`."""
        return self.old is self.sampled

    @property
    def mask(self) -> Tensor:
        return self.batch.reply_mask


def sampled_logprobs(batch: Batch, rollouts: Sequence[Rollout]) -> Tensor:
    """[B, L] each reply token's log-probability by whoever sampled it; 0.0 elsewhere. rollouts: the batch's rows, in order."""
    spread = torch.zeros_like(batch.reply_mask)
    logprobs = [logprob for rollout in rollouts for logprob in rollout.logprobs]
    spread[batch.reply_mask.bool()] = torch.tensor(logprobs, device=spread.device)
    return spread


def disagreement(part: Microbatch) -> Tensor:
    """[B] standard deviation among the ensemble's heads; 0.0 where there is but one."""
    return part.scores.std(1) if part.scores.shape[1] > 1 else torch.zeros_like(part.ended)


def whiten_together(microbatches: Sequence[Microbatch], team: Team = ALONE) -> None:
    """`ppo_math.whiten` of the advantages, over microbatches of different lengths together, and over all processes."""
    flat = torch.cat([part.advantages[part.mask.bool()] for part in microbatches])[None]
    white = ppo_math.whiten(flat, torch.ones_like(flat), team.sum)[0]
    start = 0
    for part in microbatches:
        real = part.mask.bool()
        end = start + int(real.sum())
        part.advantages = torch.zeros_like(part.mask)
        part.advantages[real] = white[start:end]
        start = end
