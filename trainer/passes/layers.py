"""A backbone's layers, and the first of them, which no adapter changes: computed once for policy and reference and all passes of PPO.

What they make of a batch does not change while the layers after them are trained. The reference's pass keeps it, and the policy's go
on from there, forward and backward. (Sparrow, arXiv:2209.14375, shares 64 of 80 layers so.)

Legend: B sequences, L tokens, H channels.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

LAYERS = ("layers", "h")
"""Names of a backbone's list of layers."""


def find_layers(backbone: nn.Module) -> list[nn.Module]:
    """In their order; none where a backbone has no list of them."""
    found = (getattr(backbone, name, None) for name in LAYERS)
    return next((list(layers) for layers in found if isinstance(layers, nn.ModuleList)), [])


def count_adapted(num_layers: int, share: float) -> int:
    """How many of so many layers, the last ones, a share of them is."""
    return math.ceil(num_layers * share)


def find_frozen_layers(backbone: nn.Module) -> list[nn.Module]:
    """Those before the first one with an adapter; none where no layer has one, or later layers read more of them than their output."""
    layers = find_layers(backbone)
    adapted = (number for number, layer in enumerate(layers) if _has_adapter(layer))
    # Gemma 3n's last layers attend to keys and values of others.
    shares = bool(getattr(getattr(backbone, "config", None), "num_kv_shared_layers", 0))
    return [] if shares else layers[: next(adapted, 0)]


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within it what the last of these makes of a batch is put into the list: (B, L, H). Nothing where it makes more than that."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)

    if not layers:
        yield outputs
        return
    with layers[-1].register_forward_hook(keep):
        yield outputs


@contextmanager
def skipped(layers: Sequence[nn.Module], output: Tensor | None) -> Iterator[None]:
    """Within it none of these is computed: each makes of the batch what `recorded` says that the last one does. None: all are."""
    layers = layers if output is not None else ()
    for layer in layers:
        layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _has_adapter(layer: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in layer.modules())
