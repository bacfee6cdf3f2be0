"""What is reported of a reward model, by hand."""

from pathlib import Path

import pytest
import torch

from tests.tiny_model import make_model
from trainer import reward_quality
from trainer.features import num_features
from trainer.models import Roles
from trainer.preferences import Pair, Source
from trainer.reward_model import Head


def test_a_model_of_length_alone_by_hand(tmp_path: Path) -> None:
    """Score = length, so the margin of a reply that is one token longer is 1: probability .731."""
    roles = Roles.load(make_model(tmp_path), rank=4)
    prompt = roles.prompt_ids([{"role": "user", "content": "so?"}])
    short, long = [40, 1], [40, 40, 1]
    size = num_features(roles.hidden_size)
    weight = torch.zeros(size, 1)
    weight[-1] = 1.0
    head = Head(torch.ones(size), weight, torch.zeros(1), torch.ones(1))
    liked, ours = Source("a", policies=("policy-000000", None)), Source("b", cohort="ranking")
    pairs = [
        Pair(prompt, long, short, 1.0, liked),
        Pair(prompt, short, long, 0.0, liked),
        Pair(prompt, long, short, 0.0, ours),
        Pair(prompt, long, short, 0.5, ours),  # a tie says nothing of order
    ]
    quality = reward_quality.measure(roles, head, pairs)
    assert quality.accuracy.share == pytest.approx(2 / 3)
    assert quality.accuracy.num_pairs == 3
    assert quality.log_loss == pytest.approx((0.3133 * 2 + 1.3133) / 3, abs=1e-3)
    [only] = quality.reliability
    assert (only.confidence, only.accuracy) == (pytest.approx(0.7311, abs=1e-3), pytest.approx(2 / 3))
    assert quality.calibration_error == pytest.approx(0.7311 - 2 / 3, abs=1e-3)
    assert quality.by_policy["policy-000000"].share == 1.0
    assert {name: each.num_pairs for name, each in quality.by_cohort.items()} == {"ranking": 1, "vote": 2}
    assert quality.length_correlation == pytest.approx(1.0)
