"""RMSNorm as one step against a family's own: the same numbers and gradients; what computes something else is left alone."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from trainer.passes.norm import use_one_step_norms

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make(kind: type[torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    norm = kind(16).to(dtype)
    with torch.no_grad():
        torch.nn.init.normal_(norm.weight, mean=1.0, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return norm


def run(norm: torch.nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients for input and weight."""
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    output = norm(x)
    up = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return [output, *torch.autograd.grad(output, (x, norm.weight), up)]


@DTYPES
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_numbers_and_gradients_are_the_familys(kind: type[torch.nn.Module], dtype: torch.dtype) -> None:
    theirs, ours = make(kind, dtype), make(kind, dtype)
    use_one_step_norms(ours)
    assert "forward" in vars(ours)
    found, wanted = run(ours, dtype), run(theirs, dtype)
    assert torch.equal(found[0], wanted[0])
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert (one - other).float().norm() <= (
            1e-6 if dtype is torch.float32 else 0.01
        ) * other.float().norm()


@DTYPES
def test_a_norm_with_other_numbers_is_left_alone(dtype: torch.dtype) -> None:
    norm = make(Gemma2RMSNorm, dtype)
    use_one_step_norms(norm)
    assert "forward" not in vars(norm)


def test_a_copy_of_a_module_reads_its_own_weight() -> None:
    norm = make(LlamaRMSNorm, torch.float32)
    use_one_step_norms(norm)
    copied = deepcopy(norm)
    with torch.no_grad():
        norm.weight.zero_()
    assert copied(torch.ones(1, 16)).any()


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm = make(LlamaRMSNorm, torch.float32).requires_grad_(False)
    use_one_step_norms(norm)
    x = torch.randn(2, 16, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None
