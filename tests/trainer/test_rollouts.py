"""Drawing one token of each row, with probability proportional to its weight."""

import pytest
import torch

from trainer.rollouts import draw


def test_indices_are_drawn_as_often_as_their_weights_say() -> None:
    weights = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 2.0, 2.0, 4.0]])
    drawn = draw(weights.repeat_interleave(10_000, 0), torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 1)
    shares = torch.stack([row.bincount(minlength=4) for row in drawn.view(2, -1)]) / 10_000
    assert not shares[weights == 0].any()
    torch.testing.assert_close(shares, weights / weights.sum(1, keepdim=True), atol=0.02, rtol=0)


@pytest.mark.parametrize("point", [0.0, 1 - 2**-24])
def test_what_has_no_weight_is_not_drawn_at_the_ends_either(
    point: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda rows, columns, **_: torch.full((rows, columns), point))
    weights = torch.tensor([[0.0, 0.0, 1e-3, 1.0, 0.0], [0.0, 0.0, 7e8, 3e-9, 0.0]])
    first, second = draw(weights, torch.Generator())[:, 0].tolist()
    assert (first, second) == ((2, 2) if point == 0.0 else (3, 2))
