"""Attention for short sequences on a CPU: two products and a softmax, where PyTorch's kernel for long ones is slow.

PyTorch's CPU kernel never holds all scores at once. That saves memory where sequences are long, and costs time where they are short:
backward in bfloat16, 16 sequences of 71 tokens and 4 heads, took it 13.8 ms, and takes 3.0 ms like this (AMD EPYC, 2 cores).

Legend: B sequences, H heads, G key-value heads, Q and K tokens that ask and are asked, D head size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "short_on_cpu"
MOST_SCORES = 256 * 256
"""Of a sequence and head; from there on PyTorch's kernel is as fast."""
MOST_IN_ALL = 1 << 26
"""Of all sequences and heads together: 128 MiB in bfloat16."""


def use_short_attention(model: PreTrainedModel) -> None:
    """Has the model compute so, where it would have left attention to PyTorch."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it. query: (B, H, Q, D), key, value: (B, G, K, D), mask: (B or 1, 1, Q, K); returns (B, Q, H, D)."""
    if not _suits(query, key, options):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()
    scale = options.get("scaling") or 1 / math.sqrt(query.shape[3])
    return _attend(query * scale, key, value, attention_mask).transpose(1, 2).contiguous(), None


def _suits(query: Tensor, key: Tensor, options: dict[str, Any]) -> bool:
    """In float32 PyTorch's kernel is as fast but for a single token."""
    num_scores = query.shape[2] * key.shape[2]
    fits = num_scores <= MOST_SCORES and num_scores * query.shape[0] * query.shape[1] <= MOST_IN_ALL
    short = fits and (query.dtype is torch.bfloat16 or query.shape[2] == 1)
    unusual = options.get("dropout") or any(
        options.get(name) is not None for name in ("position_bias", "cache")
    )
    return short and not unusual and query.device.type == "cpu"


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, Q, D). query: already scaled; mask: True, or 0.0, where a token may be seen."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # several heads ask the same keys
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # A single token asks: not by bfloat16's matrix product, which copies keys out of a larger cache, and has a kernel for each length.
    one = query.shape[2] == 1 and query.dtype is torch.bfloat16
    scores = (key * query).sum(-1)[:, :, None] if one else query @ key.mT
    if mask is not None and mask.dtype is torch.bool:
        # Not minus infinity: a row of padding sees nothing at all.
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    return (weights.mT * value).sum(2, keepdim=True) if one else weights @ value
