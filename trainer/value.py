"""The value: a linear head on what the anchor makes of a prefix. It starts as the reward model and is then fit to returns.

Before a token is chosen it sees the reward model's features of the reply so far, and the last hidden state. Fitting is recursive
least squares: exact, without a learning rate, older iterations fading.

Legend: B sequences, L tokens, H hidden size, F reward features, G = F + H + 1 value features.
"""

import torch
from torch import Tensor

from trainer.reward_model import Head
from trainer.team import ALONE, Team

FORGETTING = 0.6
"""Weight of an iteration's data one iteration later."""
RIDGE = 20.0
"""Pull towards the reward model's weights, in tokens' worth of data."""
ROUNDING = 1e-5
"""Share of a feature's moment that is added to it, and more than products in float32 are off by: those that are constant and large
would else leave no positive definite matrix."""


class Value:
    """Linear in `value_features`."""

    def __init__(self, head: Head, hidden: int, team: Team = ALONE) -> None:
        """Starts as the mean of the reward model's heads, on the reply so far."""
        self.team = team
        weight = (head.weight / head.spread).mean(1) / head.scale
        bias = -(head.offset / head.spread).mean()
        self.scale = torch.cat([head.scale, head.scale[hidden : 2 * hidden], head.scale.new_ones(1)])
        start = torch.cat([weight, weight.new_zeros(hidden), bias[None]]) * self.scale
        self.start = start.double()
        self.weight = self.start.clone()
        self.moment = torch.zeros(len(start), len(start), dtype=torch.float64, device=start.device)
        self.target = torch.zeros_like(self.start)

    def __call__(self, features: Tensor, mask: Tensor) -> Tensor:
        """[B, L, G] -> [B, L] values before each reply token; 0.0 elsewhere."""
        return ((features / self.scale) @ self.weight.to(features.dtype)) * mask

    def state(self) -> dict[str, Tensor]:
        """What fitting goes on from."""
        return {"weight": self.weight, "moment": self.moment, "target": self.target}

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Whether a state is of such features: another release may have read others."""
        return state["weight"].shape == self.weight.shape

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Puts a state back."""
        self.weight, self.moment, self.target = state["weight"], state["moment"], state["target"]

    def fade(self) -> None:
        """To be called once an iteration, before its data are added. All processes know the same; one of them keeps it."""
        kept = FORGETTING if self.team.leads else 0.0
        self.moment *= kept
        self.target *= kept

    def add(self, features: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Adds the data of a batch. features: (B, L, G), returns, mask: (B, L)."""
        real = mask.bool()
        rows = features[real] / self.scale
        # Products in float32, of which many are taken a second, and sums of them in float64.
        self.moment += rows.T @ rows
        self.target += rows.T @ returns[real]

    def fit(self) -> None:
        """Weights from all data that any process has added so far."""
        self.moment, self.target = self.team.sum(self.moment), self.team.sum(self.target)
        ridged = self.moment.clone()
        ridged.diagonal().mul_(1 + ROUNDING).add_(RIDGE)
        root = torch.linalg.cholesky(ridged, out=ridged)  # there are thousands of features: in place
        self.weight = torch.cholesky_solve((self.target + RIDGE * self.start)[:, None], root)[:, 0]
