"""Linear layers for sampling on a CPU: adapters merged into copies of the weights, laid out once as matrix products want them.

Sampling reads a few rows at a time, thousands of times with the same weights. A product of 16 rows with 512 x 512 weights in bfloat16
takes 65 us, nearly half of it to lay the weights out anew; with packed ones 39 us (AMD EPYC, 2 cores). An adapter by itself is two
more products, thin ones, which cost as much again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainer.passes.lora import LowRankLinear

MOST_BYTES = 1 << 30
"""Of copies. With more weights a product takes the time that reading them takes, however they are laid out."""
PACK = "_reorder_linear_weight"
"""oneDNN's, as PyTorch's own compiler uses it: not every build has it."""


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within it the model's linear layers compute on packed copies of the weights that they have now; without gradients.

    Merged weights are rounded to the type that is computed in, as those of a merged policy that is served.
    """
    changed = []
    try:
        for layer in _linear_layers(model) if _can_pack(model) else ():
            outer = layer.get_base_layer() if isinstance(layer, LowRankLinear) else layer
            weight = layer.merged_weight() if isinstance(layer, LowRankLinear) else layer.weight
            if weight is not None:
                layer.forward = _packed_forward(weight, outer.bias)  # type: ignore[assignment]
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _can_pack(model: nn.Module) -> bool:
    weights = list(model.parameters())
    fits = sum(each.nbytes for each in weights) <= MOST_BYTES
    on_cpu = all(each.device.type == "cpu" for each in weights)
    return fits and on_cpu and hasattr(torch.ops.mkldnn, PACK) and _takes(_compute_dtype(weights[0]))


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _takes(dtype: torch.dtype) -> bool:
    """Whether packed products are there for it: in bfloat16 they need AVX-512, or AVX2 with conversions."""
    return dtype is not torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear | LowRankLinear]:
    """The outermost: not the parts of one with an adapter."""
    for child in module.children():
        if type(child) is nn.Linear or isinstance(child, LowRankLinear):
            yield child
        elif not isinstance(child, LoraLayer):
            yield from _linear_layers(child)


def _packed_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    dtype = _compute_dtype(weight)
    bias = None if bias is None else bias.to(dtype)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))

    def forward(x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), laid_out, bias, "none", [], "")
        return output

    return forward
