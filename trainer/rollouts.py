"""Sampling replies from a model on this machine: batched, with a key-value cache that has room for them, rows dropped as they end.

Legend: B sequences, P prompt tokens, T reply tokens, V vocabulary.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from trainer.passes.packing import packed
from trainer.passes.shapes import LENGTH, ROWS, round_up

SHRINK = 0.9
"""Share of rows still under way at which the others are dropped: dropping copies the cache, keeping them computes for nothing."""


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
        with packed(model):
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
        mask = torch.cat([mask, mask.new_ones(len(prompts), self.max_tokens)], dim=1)
        seen = ids.shape[1]  # tokens that the model has seen with the next pass
        cache = _make_cache(model, self.max_tokens)
        rows = list(range(len(prompts)))  # which prompt each row of the batch is
        replies: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        done = [False] * len(prompts)  # also where the context is full
        # By index: for a slice, the product with the head copies the head for each row.
        last = torch.tensor([-1], device=device)
        for _ in range(self.max_tokens):
            logits = model(
                input_ids=ids,
                attention_mask=mask[:, :seen],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            ).logits[:, -1]
            distribution = torch.log_softmax(logits.float() / self.temperature, dim=-1)  # (B, V)
            odds = (
                distribution - distribution.max(dim=-1, keepdim=True).values
            ).exp()  # (B, V) 1 at the likeliest
            tokens = draw(odds * (odds >= self.min_p), generator)
            chosen = distribution.gather(1, tokens)[:, 0].tolist()
            for row, token, logprob in zip(rows, tokens[:, 0].tolist(), chosen, strict=True):
                if done[row]:
                    continue
                replies[row].append(token)
                logprobs[row].append(logprob)
                ended[row] = token in self.end_ids
                done[row] = ended[row] or len(prompts[row]) + len(replies[row]) >= self.context_tokens
            keep = [index for index, row in enumerate(rows) if not done[row]]
            if not keep:
                break
            ids, positions, seen = (
                tokens,
                (positions[:, -1:] + 1).clamp(max=self.context_tokens - 1),
                seen + 1,
            )
            num_kept = round_up(len(keep), ROWS)
            if num_kept <= SHRINK * len(rows):
                keep += [index for index, row in enumerate(rows) if done[row]][: num_kept - len(keep)]
                kept = torch.tensor(keep, device=device)
                cache.batch_select_indices(kept)
                ids, positions, mask = ids[kept], positions[kept], mask[kept]
                rows = [rows[index] for index in keep]
        return [Rollout(*row) for row in zip(prompts, replies, logprobs, ended, strict=True)]


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1) of each row an index, with probability proportional to its weight: one random number a row. weights: (B, V).

    `torch.multinomial` draws one for each weight, which took a tenth of sampling.
    """
    sums = weights.cumsum(-1)
    # Below the whole also where rounding would have made it the whole.
    whole = sums[:, -1:].nextafter(sums.new_zeros(1))
    points = torch.rand(len(sums), 1, generator=generator, device=sums.device) * whole
    return torch.searchsorted(sums, points, right=True)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, with room for the tokens to come: each is written once, where others copy all before it."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens. Both (B, heads, tokens, head size). Returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all_keys, self._all_values = self._make_room(key_states), self._make_room(value_states)
        start, self._length = self._length, self._length + key_states.shape[2]
        self._all_keys[:, :, start : self._length] = key_states
        self._all_values[:, :, start : self._length] = value_states
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        self._all_keys, self._all_values = self._all_keys[indices], self._all_values[indices]
        self._show()

    def _make_room(self, states: Tensor) -> Tensor:
        num_rows, heads, tokens, size = states.shape
        return states.new_empty(num_rows, heads, tokens + self._room, size)

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys = self._all_keys[:, :, : self._length]
        self.values = self._all_values[:, :, : self._length]
        return self.keys, self.values


def _make_cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """A model's own kind of cache; layers that keep everything get room for so many tokens more than the prompt."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def pad_left(sequences: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, P), with the padding on the left."""
    longest = round_up(max(len(sequence) for sequence in sequences), LENGTH)
    ids = [[pad_id] * (longest - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
