"""The last layer, computed only where something is read from it: at the reply's tokens, and those that they are chosen from.

Of a prompt's tokens later ones read the last layer's keys and values. Nothing reads what it makes of them beyond: not its queries, not
what attention hands on, not its feed-forward part, which together are most of a layer. What is left out is zero.

Legend: B sequences, L tokens, N = B L, n places that are computed, H channels.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.passes.layers import find_layers

PARTS = frozenset({"mlp", "q_proj", "o_proj", "c_proj"})
"""A layer's parts, by their names in transformers, whose output at a token needs their input there alone, and is read there alone."""


@contextmanager
def last_layer_at(backbone: nn.Module, places: Tensor, shape: torch.Size) -> Iterator[None]:
    """Within it the backbone reads batches of one shape, and its last layer is computed at some places of the flattened batch.

    A backbone without a list of layers is computed whole. places: (n,), none twice; shape: (B, L).
    """
    layers = find_layers(backbone)
    with ExitStack() as stack:
        for part in _parts(layers[-1]) if layers else ():
            stack.enter_context(part.register_forward_pre_hook(partial(_take, places)))
            stack.enter_context(part.register_forward_hook(partial(_put, places, shape)))
        yield


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost."""
    for name, child in module.named_children():
        if name in PARTS:
            yield child
        else:
            yield from _parts(child)


def _take(places: Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = inputs
    return _Take.apply(hidden.flatten(0, 1), places)[None], *others  # type: ignore[no-untyped-call]


def _put(places: Tensor, shape: torch.Size, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):  # of experts: what their router said as well
        return _put(places, shape, _, __, output[0]), *output[1:]
    return _Put.apply(output[0], places, shape.numel()).view(*shape, -1)  # type: ignore[no-untyped-call]


class _Take(torch.autograd.Function):
    """Some rows. None is taken twice, so that backward need not add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        """(N, H) -> (n, H)."""
        ctx.save_for_backward(places)
        ctx.num_rows = len(rows)
        return rows[places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        [places] = ctx.saved_tensors
        return _spread(grad, places, ctx.num_rows), None


class _Put(torch.autograd.Function):
    """Rows back to their places, among zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, num_rows: int) -> Tensor:
        """(n, H) -> (N, H)."""
        ctx.save_for_backward(places)
        return _spread(rows, places, num_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        [places] = ctx.saved_tensors
        return grad[places], None, None


def _spread(rows: Tensor, places: Tensor, num_rows: int) -> Tensor:
    spread = rows.new_zeros(num_rows, rows.shape[1])
    spread[places] = rows
    return spread
