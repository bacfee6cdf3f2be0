"""PPO on a tiny model, for a reward that any model can learn."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from trainer.consensus import Asked, Consensus
from trainer.features import read_features
from trainer.fleet_rollouts import FleetSampler
from trainer.models import POLICY, Roles
from trainer.ppo import PPO, PPOSettings
from trainer.reward_model import Head
from trainer.rollouts import Rollout, Sampler
from trainer.team import ALONE, Team

SETTINGS = PPOSettings(iterations=14, rollouts=64, minibatch=16, max_tokens=8, kl_start=0.01, kl_budget=50.0)


@dataclass
class HalfFleet(FleetSampler):
    """Answers every second prompt, as a policy would whose log-probabilities are `off` by so much."""

    off: float = 0.0
    replies: list[Rollout] = field(default_factory=list)

    def sample(self, roles: Roles, prompts: Sequence[list[int]], sampler: Sampler) -> list[Rollout | None]:
        with roles.acting_as(POLICY):
            found = sampler.sample(roles.model, prompts[::2], torch.Generator().manual_seed(7))
        moved = [replace(reply, logprobs=[each - self.off for each in reply.logprobs]) for reply in found]
        self.replies += moved
        answers = iter(moved)
        return [None if number % 2 else next(answers) for number in range(len(prompts))]


def start(roles: Roles, settings: PPOSettings = SETTINGS, team: Team = ALONE) -> PPO:
    """The reward likes what does not surprise the anchor. When it is surest it says a or b."""
    prompts = [roles.prompt_ids([{"role": "user", "content": text}]) for text in ("lemon", "colour?")]
    roles.consensus = Consensus.of({tuple(prompt): Asked("?", ["a", "b"]) for prompt in prompts})
    features = read_features(roles, [(prompt, [40 + n, 60, 1]) for n, prompt in enumerate(prompts)])
    weight = torch.zeros(features.shape[1], 1)
    weight[-3] = 1.0  # surprise, with a minus
    head = Head(torch.ones(features.shape[1]), weight, torch.tensor([-4.0]), torch.tensor([0.5]))
    return PPO(roles, head, head, prompts, settings, seed=0, team=team)
