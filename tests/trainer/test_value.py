"""The value's least squares."""

import torch

from trainer.reward_model import Head
from trainer.value import Value


def of_nothing(features: int) -> Value:
    """A value of reward models that know nothing."""
    return Value(
        Head(torch.ones(features), torch.zeros(features, 1), offset=torch.zeros(1), spread=torch.ones(1)),
        hidden=1,
    )


def test_it_is_fit_to_returns_where_features_are_constant_and_large() -> None:
    generator = torch.Generator().manual_seed(0)
    value = of_nothing(8)  # and so reads 8 + 1 + 1
    features = torch.randn(75, 8, 10, generator=generator)
    features[..., 1:4] = torch.tensor([1110.0, 2700.0, 9100.0])
    returns = features[..., 0] + 0.5
    mask = torch.ones(75, 8)
    value.fade()
    value.add(features, returns, mask)
    value.fit()
    assert (value(features, mask) - returns).abs().mean() < 0.1
