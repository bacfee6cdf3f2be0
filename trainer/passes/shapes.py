"""Sizes are rounded up, so that few differ: for each size of a matrix product that it has not met, oneDNN makes a kernel.

That takes about a millisecond, and of the last 1,024 it keeps. Lengths of replies are never the same twice: unrounded, an iteration of
PPO on the starter makes hundreds of kernels, which took a seventh of its time. Graphics cards like round sizes, too.
"""

import torch
from torch import Tensor

LENGTH = 8
"""Tokens of a sequence."""
ROWS = 16
"""Sequences that are sampled together."""
PLACES = 64
"""Tokens of a batch."""


def round_up(number: int, step: int) -> int:
    """To a multiple of it."""
    return -(-number // step) * step


def choose_places(wanted: Tensor) -> Tensor:
    """(n,) where a flattened mask is true, in order; then some other places, which round their number up."""
    flat = wanted.flatten()
    order = torch.argsort(~flat, stable=True)
    return order[: round_up(int(flat.sum()), PLACES)]
