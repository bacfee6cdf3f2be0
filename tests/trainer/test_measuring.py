"""Measured is what PPO measures: the same numbers from the same replies."""

from pathlib import Path

import pytest
import torch

from tests.tiny_model import make_model
from trainer.features import read_features
from trainer.measuring import measure
from trainer.models import POLICY, Roles
from trainer.ppo import PPO, PPOSettings
from trainer.reward_model import Head
from trainer.rollouts import Sampler

SCORING = PPOSettings(minibatch=4, max_tokens=6, temperature=0.8)
ONLY_PPO = {"clipped", "value_explained", "kl_coefficient", "number"}


@pytest.fixture
def roles(tmp_path: Path) -> Roles:
    torch.manual_seed(0)
    roles = Roles.load(make_model(tmp_path), rank=4)
    with torch.no_grad():
        for weights in roles.policy_parameters():
            weights.add_(0.02)
    return roles


def test_the_numbers_are_ppos(roles: Roles) -> None:
    num_features = read_features(roles, [([5], [40, 1])]).shape[1]
    weight = torch.randn(num_features, 3, generator=torch.Generator().manual_seed(0))
    head = Head(torch.ones(num_features), weight, torch.zeros(3), torch.ones(3))
    prompts = [[5, 6, 7 + number] for number in range(10)]
    sampler = Sampler(roles.end_ids, SCORING.max_tokens, SCORING.temperature)
    with roles.acting_as(POLICY):
        rollouts = sampler.sample(roles.model, prompts, torch.Generator().manual_seed(1))

    mine = measure(3, roles, head, head, rollouts, SCORING, kl_coefficient=0.1)

    ppo = PPO(roles, head, head, prompts, SCORING, seed=0)
    theirs = ppo._measure(3, ppo._read(rollouts))
    assert mine.kl > 0.0
    assert mine.judges == pytest.approx(theirs.pop("judges"), rel=1e-4)
    assert {name: getattr(mine, name) for name in theirs.keys() - ONLY_PPO} == pytest.approx(
        {name: value for name, value in theirs.items() if name not in ONLY_PPO}, rel=1e-4
    )
    assert (mine.number, mine.kl_coefficient, mine.clipped, mine.value_explained) == (3, 0.1, 0.0, 0.0)


def test_no_replies_are_refused(roles: Roles) -> None:
    head = Head(torch.ones(1), torch.ones(1, 1), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="no replies"):
        measure(0, roles, head, head, [], SCORING, 0.1)
