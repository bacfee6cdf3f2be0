"""Short attention against PyTorch's: the same numbers, whatever the mask, and long sequences left to PyTorch."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.tiny_model import make_family
from trainer.models import Roles
from trainer.passes import attention


def draw(heads: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries of 4 heads, keys and values of `heads`, for 3 sequences."""
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((3, 4, queries, 8), (3, heads, keys, 8), (3, heads, keys, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def attend(inputs: list[Tensor], mask: Tensor | None = None, **options: Any) -> Tensor:
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    module.num_key_value_groups = inputs[0].shape[1] // inputs[1].shape[1]  # type: ignore[assignment]
    return attention.attend(module, *inputs, mask, **options)[0].transpose(1, 2)


def padded(queries: int, keys: int) -> Tensor:
    """[3, 1, Q, K] what may be seen: causal, and the second sequence begins with two tokens of padding."""
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).repeat(3, 1, 1, 1)
    mask[1, :, :, :2] = False
    return mask


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("queries", "kind"),
    [(12, "causal"), (1, "causal"), *itertools.product((12, 5, 1), ("bool", "float"))],
)
def test_it_attends_as_pytorch_does(heads: int, queries: int, kind: str) -> None:
    keys = 12
    inputs = draw(heads, queries, keys, torch.bfloat16)
    exact = [each.detach().float().requires_grad_() for each in inputs]
    allowed = padded(queries, keys) if kind != "causal" else None
    mask = allowed
    if allowed is not None and kind == "float":
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e30).bfloat16()
    found = attend(inputs, mask)
    wanted = scaled_dot_product_attention(
        *exact, attn_mask=allowed, is_causal=allowed is None and queries > 1, enable_gqa=True
    )
    real = torch.ones(3, 1, queries, 1) if allowed is None else allowed.any(-1, keepdim=True).float()
    (found.float() * real).sum().backward()
    (wanted * real).sum().backward()
    for ours, theirs in [
        (found * real, wanted * real),
        *zip([i.grad for i in inputs], [e.grad for e in exact], strict=True),
    ]:
        assert (ours.float() - theirs).norm() <= 0.02 * theirs.norm() + 1e-3


def test_a_row_of_padding_is_a_number() -> None:
    mask = padded(12, 12)
    mask[0, :, 0] = False
    assert attend(draw(4, 12, 12, torch.bfloat16), mask).isfinite().all()


def test_the_scale_is_the_models_own() -> None:
    inputs = draw(4, 1, 9, torch.float32)
    torch.testing.assert_close(attend(inputs, scaling=0.5), scaled_dot_product_attention(*inputs, scale=0.5))


@pytest.mark.parametrize(
    ("sequences", "queries", "dtype", "options"),
    [
        (1, attention.MOST_SCORES, torch.bfloat16, {}),
        (attention.MOST_IN_ALL // 144 + 1, 12, torch.bfloat16, {}),
        (1, 12, torch.float32, {}),
        (1, 12, torch.bfloat16, {"position_bias": torch.zeros(1, 4, 12, 12)}),
    ],
    ids=["long", "many", "float32", "position bias"],
)
def test_the_rest_is_left_to_pytorch(
    sequences: int,
    queries: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **__: ("left to PyTorch", None))
    query = torch.zeros(sequences, 1, queries, 1, dtype=dtype)
    key = query[:, :, :12]
    assert attention.attend(nn.Module(), query, key, key, None, **options) == ("left to PyTorch", None)


def test_models_use_it_on_a_cpu(tmp_path: Path) -> None:
    for family, expected in (("llama", attention.NAME), ("gemma2", "eager")):
        model = Roles.load(make_family(tmp_path / family, family), rank=4).model.get_base_model()
        assert model.config._attn_implementation == expected
