"""Weights that are kept in one type and computed with in another: a model's, cast for a while, as if it had been loaded so.

Autocast casts as well, but an input at a time: embeddings, norms and all that is added up stay in float32, which takes longer and
rounds otherwise than a model that is kept in bfloat16, as the engine's and the reference are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it the model's weights are of that type. Gradients reach those that are kept, in theirs."""
    places: list[tuple[dict[str, Any], str, nn.Parameter]] = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.is_floating_point() and weight.dtype is not dtype
    ]
    casts = {weight: weight.to(dtype) for _, _, weight in places}  # tied weights stay tied
    try:
        for weights, name, weight in places:
            weights[name] = casts[weight]
        yield
    finally:
        for weights, name, weight in places:
            weights[name] = weight
