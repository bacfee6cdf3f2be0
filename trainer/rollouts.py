"""Sampling replies from a model on this machine: batched, with a key-value cache, rows dropped as they end.

Legend: B sequences, P prompt tokens, T reply tokens, V vocabulary.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled reply."""

    prompt_ids: list[int]
    reply_ids: list[int]
    """[T] sampled tokens; the last one is an end token where `ended`."""
    logprobs: list[float]
    """[T] log-probability of each sampled token at the sampling temperature, before any token was ruled out."""
    ended: bool
    """False where the reply was cut off."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """How replies are sampled."""

    end_ids: tuple[int, ...]
    """Tokens that end a reply."""
    max_tokens: int
    """Longest reply, end token included."""
    temperature: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are never drawn; 0 rules none out."""
    batch_size: int = 256
    """Sequences sampled at once."""
    context_tokens: int = sys.maxsize
    """Longest prompt and reply together, which cuts a reply off as the longest reply does."""

    @torch.no_grad()
    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        generator: torch.Generator,
    ) -> list[Rollout]:
        """One reply to each prompt, in the order given. Prompts of like length are batched, so that padding is little."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        rollouts: dict[int, Rollout] = {}
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            batch = self._sample_batch(model, [prompts[index] for index in indices], generator)
            rollouts |= dict(zip(indices, batch, strict=True))
        return [rollouts[index] for index in range(len(prompts))]

    def _sample_batch(
        self, model: PreTrainedModel, prompts: list[list[int]], generator: torch.Generator
    ) -> list[Rollout]:
        device = model.device
        ids, mask = pad_left(prompts, self.end_ids[0], device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        rows = list(range(len(prompts)))  # which prompt each row of the batch is
        replies: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for _ in range(self.max_tokens):
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            distribution = torch.log_softmax(logits.float() / self.temperature, dim=-1)  # (B, V)
            odds = (
                distribution - distribution.max(dim=-1, keepdim=True).values
            ).exp()  # (B, V) 1 at the likeliest
            tokens = torch.multinomial(odds * (odds >= self.min_p), 1, generator=generator)  # (B, 1)
            chosen = distribution.gather(1, tokens)[:, 0].tolist()
            for row, token, logprob in zip(rows, tokens[:, 0].tolist(), chosen, strict=True):
                replies[row].append(token)
                logprobs[row].append(logprob)
                ended[row] = token in self.end_ids
            keep = [
                index
                for index, row in enumerate(rows)
                if not ended[row] and len(prompts[row]) + len(replies[row]) < self.context_tokens
            ]
            if not keep:
                break
            ids, positions = tokens, positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if len(keep) < len(rows):  # rows that are done cost nothing more
                kept = torch.tensor(keep, device=device)
                cache.batch_select_indices(kept)
                ids, positions, mask = ids[kept], positions[kept], mask[kept]
                rows = [rows[index] for index in keep]
        return [Rollout(*row) for row in zip(prompts, replies, logprobs, ended, strict=True)]


def pad_left(sequences: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, P), with the padding on the left."""
    longest = max(len(sequence) for sequence in sequences)
    ids = [[pad_id] * (longest - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
