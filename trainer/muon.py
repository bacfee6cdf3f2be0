"""Muon: momentum whose update is made orthogonal, for the matrices between embedding and head.

`torch.optim.Muon` is the same method, but orthogonalizes in bfloat16 always, which a CPU without such instructions emulates:
135 ms of a step of 240 ms there, where float32 takes 40.
Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the step is scaled to AdamW's
as in Liu et al., arXiv:2502.16982.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose repeated use brings every singular value near 1, the small ones fast."""


class Muon(torch.optim.Optimizer):
    """Takes matrices alone. lr: as one would give AdamW; dtype: to orthogonalize in."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(matrices, {"lr": lr})
        self.dtype = dtype
        if any(matrix.ndim != 2 for matrix in self.param_groups[0]["params"]):
            raise ValueError("Muon takes matrices alone: give AdamW the rest.")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every matrix that has a gradient; those of one shape are orthogonalized together."""
        for group in self.param_groups:
            directions: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    directions[matrix.shape].append((matrix, self._direction(matrix, matrix.grad)))
            for shape, alike in directions.items():
                updates = orthogonalize(torch.stack([direction for _, direction in alike]).to(self.dtype))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # an update of AdamW's usual size
                for (matrix, _), update in zip(alike, updates, strict=True):
                    matrix.add_(update, alpha=-rate)

    def _direction(self, matrix: nn.Parameter, gradient: Tensor) -> Tensor:
        """Nesterov momentum."""
        if "momentum" not in self.state[matrix]:
            self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = self.state[matrix]["momentum"]
        momentum.lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def orthogonalize(matrices: Tensor) -> Tensor:
    """[N, rows, columns], each with its singular values brought near 1 (about 0.7 to 1.2) by Newton-Schulz iteration."""
    linear, cubic, quintic = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x.mT if tall else x
