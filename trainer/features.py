"""What heads read of a reply, from one pass of the anchor: reward models of the whole of it, the value of what is there so far.

Of a reply: the sum of its words (input embeddings; by their mean a reply would be best that leaves all else out), the mean of its last
hidden states (what is said with them), how much it surprises the anchor, and how far it says what that says when it is surest (a right
answer is a likely one, and most of those, also to a model that often says the wrong one).

Words are made as unlike each other as their dimensions allow. Embeddings have directions that most words share, and along these what
votes say of one word would be taken to be said of others.

Surprise counts a token only as far as it is less likely than what was expected there (arXiv:2202.00666): where a manner is chosen all
of them are unlikely, and none surprises; where a fact is said, a wrong one does.

Legend: B sequences, L tokens, H hidden size, F = 2 H + 3 features of a reply, G = F + H + 1 of a prefix, N replies.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.batches import Reading
from trainer.consensus import Asked, Consensus
from trainer.models import REFERENCE, Roles
from trainer.rollouts import Sampler

NUM_PLAIN = 3
"""Features that are few and mean something by themselves: surprise, with a minus; agreement; and, last, the length."""
AGREEMENT = -2
"""The place among the features of how much a reply says of what answers its prompt, less what answers others (`Consensus`)."""
ANSWERS = 8
"""That the anchor gives to a prompt, to tell what it is surest of."""
FEWEST_ANSWERS = 2
MOST_ASKED = 16384
"""Answers to all prompts together: with more prompts than these are eight to each, each gets fewer."""
FULLY_ASKED = MOST_ASKED // ANSWERS
"""Prompts that get all of them."""
SURE_TEMPERATURE = 0.3


def num_features(hidden_size: int) -> int:
    """F."""
    return 2 * hidden_size + NUM_PLAIN


def ask_consensus(roles: Roles, sampler: Sampler, prompts: Sequence[list[int]], seed: int) -> Consensus:
    """What the anchor says to each of these prompts when it is surest. sampler: how replies are sampled, but for the temperature."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    count = max(FEWEST_ANSWERS, min(ANSWERS, MOST_ASKED // max(1, len(distinct))))
    each_so_often = [list(ids) for ids in distinct for _ in range(count)]
    generator = torch.Generator(device=roles.device).manual_seed(seed)
    with roles.acting_as(REFERENCE):
        surest = replace(sampler, temperature=SURE_TEMPERATURE)
        texts = [
            roles.decode(rollout.reply_ids)
            for rollout in surest.sample(roles.model, each_so_often, generator)
        ]
    return Consensus.of(
        {
            ids: Asked(roles.decode(list(ids)), texts[number * count : (number + 1) * count])
            for number, ids in enumerate(distinct)
        }
    )


def reward_features(reading: Reading, mask: Tensor) -> Tensor:
    """[B, F]: sum of words and mean hidden state over the reply, and the plain features (`NUM_PLAIN`).

    mask: (B, L).
    """
    length = mask.sum(1, keepdim=True).clamp(min=1)
    words = (reading.words * mask[..., None]).sum(1)
    states = (reading.states * mask[..., None]).sum(1) / length
    surprise = reading.surprise.sum(1, keepdim=True)
    return torch.cat([words, states, -surprise, reading.said.sum(1, keepdim=True), length], dim=1)


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
    divisor = count.clamp(min=1)
    so_far = torch.cat(
        [
            words.cumsum(1),
            states.cumsum(1) / divisor[..., None],
            -reading.surprise.cumsum(1)[..., None],
            reading.said.cumsum(1)[..., None],
            count[..., None],
            reading.states,
            torch.ones_like(count)[..., None],
        ],
        dim=2,
    )
    return torch.nn.functional.pad(so_far[:, :-1], (0, 0, 1, 0))
