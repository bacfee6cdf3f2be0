"""PPO on a tiny model, for a reward that any model can learn."""

import torch

from trainer.features import read_features
from trainer.models import Roles
from trainer.ppo import PPO, PPOSettings
from trainer.reward_model import Head
from trainer.team import ALONE, Team

SETTINGS = PPOSettings(iterations=14, rollouts=64, minibatch=16, max_tokens=8, kl_start=0.01, kl_budget=50.0)


def start(roles: Roles, settings: PPOSettings = SETTINGS, team: Team = ALONE) -> PPO:
    """The reward likes what the anchor finds likely."""
    prompts = [roles.prompt_ids([{"role": "user", "content": text}]) for text in ("lemon", "colour?")]
    features = read_features(roles, [(prompt, [40 + n, 60, 1]) for n, prompt in enumerate(prompts)])
    weight = torch.zeros(features.shape[1], 1)
    weight[-5] = 1.0  # the mean log-probability
    head = Head(torch.ones(features.shape[1]), weight, torch.tensor([-4.0]), torch.tensor([0.5]))
    return PPO(roles, head, head, prompts, settings, seed=0, team=team)
