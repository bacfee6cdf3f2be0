"""What models read, and what the reference makes of it.

Sequences are padded on the right: with a causal model nothing real can see the padding, so no attention mask is needed.

Legend: B sequences, L tokens of prompt and reply together, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Token sequences, padded on the right."""

    ids: Tensor
    """[B, L] prompt and reply."""
    reply_mask: Tensor
    """[B, L] 1.0 at the reply's tokens (its end token included), 0.0 at prompt and padding."""

    @staticmethod
    def collate(
        pairs: Sequence[tuple[list[int], list[int]]], pad_id: int, device: torch.device, least: int = 0
    ) -> "Batch":
        """Of (prompt ids, reply ids). least: L is this at least."""
        lengths = [len(prompt) + len(reply) for prompt, reply in pairs]
        longest = max(least, *lengths)
        ids = [p + r + [pad_id] * (longest - n) for (p, r), n in zip(pairs, lengths, strict=True)]
        mask = [
            [0.0] * len(p) + [1.0] * len(r) + [0.0] * (longest - n)
            for (p, r), n in zip(pairs, lengths, strict=True)
        ]
        return Batch(torch.tensor(ids, device=device), torch.tensor(mask, device=device))


@dataclass(frozen=True, slots=True)
class Reading:
    """What the reference makes of a batch."""

    words: Tensor
    """[B, L, H] input embeddings, float32, spread evenly over their dimensions (`Roles.read`)."""
    states: Tensor
    """[B, L, H] last hidden states, float32: of the reply and of the token before it; elsewhere nothing that means anything."""
    logprobs: Tensor
    """[B, L] log-probability of each reply token; 0.0 elsewhere."""
    surprise: Tensor
    """[B, L] nats by which each reply token was less likely than is expected there, or 0.0: -log-probability less entropy."""
    said: Tensor
    """[B, L] how much of the anchor's consensus each reply token adds to what is said (`Consensus.read`); 0.0 elsewhere."""
    lower: Tensor | None
    """[B, L, H] what the layers below all adapters make of the batch, for the policy to go on from; None where there are
    none, or the last of them makes more than that."""
