"""What heads read of a reply, from one pass of the anchor: reward models of the whole of it, the value of what is there so far.

Of a reply: the sum of its input embeddings (which words are there; by their mean a reply would be best that leaves all else out), the
mean of its last hidden states (what is said with them), and how likely the anchor found it (a right answer is a likely one, also to a
model that often says the wrong one).

Legend: B sequences, L tokens, H hidden size, F = 2 H + 4 features of a reply, G = F + H + 1 of a prefix, N replies.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.models import Reading, Roles

NUM_LIKELIHOODS = 4
"""Sum, mean and least of the log-probabilities, and the length."""


def num_features(hidden_size: int) -> int:
    """F."""
    return 2 * hidden_size + NUM_LIKELIHOODS


def reward_features(reading: Reading, mask: Tensor) -> Tensor:
    """[B, F]: sum of embeddings and mean hidden state over the reply; sum, mean and least of its log-probabilities; its length.

    mask: (B, L).
    """
    length = mask.sum(1, keepdim=True).clamp(min=1)
    words = (reading.words * mask[..., None]).sum(1)
    states = (reading.states * mask[..., None]).sum(1) / length
    total = reading.logprobs.sum(1, keepdim=True)
    least = reading.logprobs.min(1, keepdim=True).values
    return torch.cat([words, states, total, total / length, least, length], dim=1)


@torch.no_grad()
def read_features(
    roles: Roles, sequences: Sequence[tuple[list[int], list[int]]], batch_size: int = 128
) -> Tensor:
    """[N, F] of (prompt ids, reply ids), in the order given; batched by length."""
    if not sequences:
        return torch.zeros(0, num_features(roles.hidden_size), device=roles.device)
    order = sorted(range(len(sequences)), key=lambda index: sum(map(len, sequences[index])))
    rows: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        chosen = [sequences[index] for index in order[start : start + batch_size]]
        batch = roles.batch(chosen)
        rows.append(reward_features(roles.read(batch), batch.reply_mask))
    features = torch.cat(rows)
    return torch.empty_like(features).index_copy_(0, torch.tensor(order, device=features.device), features)


def value_features(reading: Reading, mask: Tensor) -> Tensor:
    """[B, L, G]: at token i, `reward_features` of the reply's tokens before i, the hidden state at i - 1, and 1.0."""
    words, states = reading.words * mask[..., None], reading.states * mask[..., None]
    count = mask.cumsum(1)
    total = reading.logprobs.cumsum(1)
    divisor = count.clamp(min=1)
    so_far = torch.cat(
        [
            words.cumsum(1),
            states.cumsum(1) / divisor[..., None],
            total[..., None],
            (total / divisor)[..., None],
            reading.logprobs.cummin(1).values[..., None],
            count[..., None],
            reading.states,
            torch.ones_like(count)[..., None],
        ],
        dim=2,
    )
    return torch.nn.functional.pad(so_far[:, :-1], (0, 0, 1, 0))
