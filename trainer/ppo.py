"""PPO on one copy of the base: sample, score, estimate advantages, update, again. Read from top to bottom.

The reward is an ensemble's pessimistic score less a KL penalty to the anchor. The penalty's coefficient is not set by hand: a
controller holds KL at a target that rises from nothing to the budget over the run, so the run walks along the curve of reward
against KL. A judge (a reward model on votes that training never saw) says where on that curve it was best; that policy is kept.

Legend: B sequences, L tokens of prompt and reply, N rollouts of an iteration.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer import ppo_math
from trainer.models import POLICY, REFERENCE, VALUE, Batch, Roles
from trainer.rollouts import Rollout, Sampler


class NonFinite(RuntimeError):
    """A loss or a weight was not a number. The cycle ends; the live policy stays."""


@dataclass(frozen=True, slots=True)
class PPOSettings:
    """How the policy is trained. One default for every model, taste and seed."""

    iterations: int = 20
    rollouts: int = 256
    """Replies sampled in an iteration."""
    epochs: int = 2
    minibatch: int = 64
    """Sequences in an optimiser step."""
    learning_rate: float = 3e-4
    value_learning_rate: float = 5e-4
    clip: float = 0.2
    value_clip: float = 0.5
    discount: float = 1.0
    trace: float = 0.95
    """lambda of generalised advantage estimation."""
    kl_start: float = 0.1
    """First KL coefficient, in standard deviations of the reward per nat; the controller takes it from there."""
    kl_budget: float = 6.0
    """KL to the anchor at the end of the run, in nats per reply."""
    disagreement: float = 0.5
    """Weight of the ensemble's standard deviation, taken off the mean score."""
    missing_end_penalty: float = 2.0
    """Taken off the score of a reply that was cut off, in standard deviations of the reward."""
    max_tokens: int = 64
    """Longest reply, end token included."""
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration measured, on the rollouts of the policy that it began with."""

    number: int
    score: float
    """Mean pessimistic ensemble score, in standard deviations over the anchor's replies."""
    judge: float
    """Mean score by the judge, in its own standard deviations over the anchor's replies."""
    judge_error: float
    """Standard error of `judge`."""
    disagreement: float
    kl: float
    """To the anchor: nats per reply (k3)."""
    kl_coefficient: float
    entropy: float
    """Mean -log-probability per sampled token, nats."""
    length: float
    """Mean reply length in tokens."""
    ended: float
    """Share of replies that ended by themselves."""
    clipped: float
    value_explained: float
    """1 - Var(return - value) / Var(return)."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Brings a reward model's scores to mean 0 and standard deviation 1 over the anchor's replies."""

    mean: float
    std: float

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std


@torch.no_grad()
def score_rollouts(roles: Roles, role: str, rollouts: Sequence[Rollout], batch_size: int = 128) -> Tensor:
    """(N,) raw scores, in the order given; batched by length."""
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt_ids) + len(rollouts[i].reply_ids))
    scores = torch.zeros(len(rollouts))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        scores[indices] = roles.scores(role, collate(roles, [rollouts[i] for i in indices])).cpu()
    return scores


def collate(roles: Roles, rollouts: Sequence[Rollout]) -> Batch:
    """Rollouts as a padded batch."""
    return Batch.collate([(r.prompt_ids, r.reply_ids) for r in rollouts], roles.pad_id, roles.device)


class PPO:
    """One training run: holds the optimisers, the reward scales and the KL controller."""

    def __init__(
        self,
        roles: Roles,
        ensemble: Sequence[str],
        judge: str,
        prompts: Sequence[list[int]],
        settings: PPOSettings,
        seed: int,
    ) -> None:
        self.roles = roles
        self.ensemble = ensemble
        self.judge = judge
        self.prompts = prompts
        self.settings = settings
        self.sampler = Sampler(roles.end_ids, settings.max_tokens, settings.temperature)
        self.generator = torch.Generator(device=roles.device).manual_seed(seed)
        self.rng = random.Random(seed)
        self.kl_coefficient = settings.kl_start
        roles.copy_scalar_role(ensemble[0], VALUE)
        self.policy_optimizer = torch.optim.AdamW(
            roles.parameters_of(POLICY), lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)
        )
        self.value_optimizer = torch.optim.AdamW(
            roles.parameters_of(VALUE), lr=settings.value_learning_rate, weight_decay=0.0, betas=(0.9, 0.95)
        )
        self.scales: dict[str, Scale] = {}

    def calibrate(self) -> None:
        """Scales of all reward models, from replies of the anchor; and the value's head to the same scale."""
        with self.roles.acting_as(REFERENCE):
            rollouts = self.sampler.sample(self.roles.model, self._draw_prompts(), self.generator)
        for role in (*self.ensemble, self.judge):
            scores = score_rollouts(self.roles, role, rollouts)
            self.scales[role] = Scale(scores.mean().item(), max(scores.std().item(), 1e-6))
        first = self.scales[self.ensemble[0]]
        head = self.roles.heads[VALUE]
        with torch.no_grad():
            head.weight.div_(first.std)
            head.bias.sub_(first.mean).div_(first.std)

    def _draw_prompts(self) -> list[list[int]]:
        return self.rng.choices(self.prompts, k=self.settings.rollouts)

    def iterate(self, number: int) -> Iteration:
        """One iteration. Raises NonFinite."""
        settings, roles = self.settings, self.roles

        # 1. sample replies from the current policy
        with roles.acting_as(POLICY):
            rollouts = self.sampler.sample(roles.model, self._draw_prompts(), self.generator)
        rollouts.sort(key=lambda rollout: len(rollout.prompt_ids) + len(rollout.reply_ids))

        # 2. score them: ensemble mean less its disagreement, less a penalty where the end is missing
        votes = torch.stack([self.scales[role](score_rollouts(roles, role, rollouts)) for role in self.ensemble])
        disagreement = votes.std(dim=0) if len(self.ensemble) > 1 else torch.zeros_like(votes[0])
        ended = torch.tensor([float(rollout.ended) for rollout in rollouts])
        scores = votes.mean(dim=0) - settings.disagreement * disagreement
        scores = scores - settings.missing_end_penalty * (1 - ended)
        judged = self.scales[self.judge](score_rollouts(roles, self.judge, rollouts))

        # 3. log-probabilities of the policy and the anchor, and values, of what was sampled
        groups = [
            list(range(start, min(start + settings.minibatch, len(rollouts))))
            for start in range(0, len(rollouts), settings.minibatch)
        ]
        batches = [collate(roles, [rollouts[index] for index in group]) for group in groups]
        old, reference, values, advantages, returns = [], [], [], [], []
        with torch.no_grad():
            for batch in batches:
                old.append(roles.logprobs(POLICY, batch, settings.temperature))
                reference.append(roles.logprobs(REFERENCE, batch, settings.temperature))
                values.append(_before_token(roles.values(VALUE, batch)) * batch.reply_mask)

        # 4. rewards per token and advantages, whitened over the real tokens of all batches
        for group, batch, o, r, v in zip(groups, batches, old, reference, values, strict=True):
            rewards = ppo_math.token_rewards(scores[group].to(o.device), o, r, batch.reply_mask, self.kl_coefficient)
            advantage, target = ppo_math.gae(rewards, v, batch.reply_mask, settings.discount, settings.trace)
            advantages.append(advantage)
            returns.append(target)
        explained = _explained(values, returns, [batch.reply_mask for batch in batches])
        advantages = _whiten_all(advantages, [batch.reply_mask for batch in batches])

        # 5. a few passes of clipped updates
        clipped = 0.0
        for _ in range(settings.epochs):
            for index in self.rng.sample(range(len(batches)), len(batches)):
                batch = batches[index]
                clipped += self._update_policy(batch, old[index], advantages[index])
                self._update_value(batch, values[index], returns[index])

        # 6. steer KL to its target, which rises through the run
        real = sum(batch.reply_mask.sum().item() for batch in batches)
        kl = sum(
            (ppo_math.kl_k3(o, r) * b.reply_mask).sum().item() for o, r, b in zip(old, reference, batches, strict=True)
        ) / len(rollouts)
        target = settings.kl_budget * (number + 1) / settings.iterations
        self.kl_coefficient = ppo_math.adapt_kl_coefficient(self.kl_coefficient, max(kl, 1e-3), target)
        return Iteration(
            number=number,
            score=scores.mean().item(),
            judge=judged.mean().item(),
            judge_error=judged.std().item() / math.sqrt(len(rollouts)),
            disagreement=disagreement.mean().item(),
            kl=kl,
            kl_coefficient=self.kl_coefficient,
            entropy=-sum(o.sum().item() for o in old) / real,
            length=real / len(rollouts),
            ended=ended.mean().item(),
            clipped=clipped / (settings.epochs * len(batches)),
            value_explained=explained,
        )

    def _update_policy(self, batch: Batch, old: Tensor, advantages: Tensor) -> float:
        logprobs = self.roles.logprobs(POLICY, batch, self.settings.temperature)
        losses, clipped = ppo_math.policy_loss(logprobs, old, advantages, batch.reply_mask, self.settings.clip)
        self._step(ppo_math.masked_mean(losses, batch.reply_mask), self.policy_optimizer)
        return ppo_math.masked_mean(clipped, batch.reply_mask).item()

    def _update_value(self, batch: Batch, old: Tensor, returns: Tensor) -> None:
        values = _before_token(self.roles.values(VALUE, batch)) * batch.reply_mask
        losses = ppo_math.value_loss(values, old, returns, batch.reply_mask, self.settings.value_clip)
        self._step(ppo_math.masked_mean(losses, batch.reply_mask), self.value_optimizer)

    def _step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        if not math.isfinite(loss.item()):
            raise NonFinite(f"PPO's loss became {loss.item()}.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _before_token(values: Tensor) -> Tensor:
    """The value before token i is chosen is the head's output at i - 1."""
    return torch.nn.functional.pad(values[:, :-1], (1, 0))


def _flat(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor[mask.bool()] for tensor, mask in zip(tensors, masks, strict=True)])


def _whiten_all(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """`ppo_math.whiten` over batches of different lengths together."""
    flat = _flat(tensors, masks)
    white = ppo_math.whiten(flat[None], torch.ones_like(flat[None]))[0]
    parts = white.split([int(mask.sum().item()) for mask in masks])
    results = []
    for mask, part in zip(masks, parts, strict=True):
        result = torch.zeros_like(mask)
        result[mask.bool()] = part
        results.append(result)
    return results


def _explained(values: Sequence[Tensor], returns: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    value, target = _flat(values, masks), _flat(returns, masks)
    return (1 - (target - value).var() / target.var().clamp(min=1e-8)).item()


Progress = Callable[[Iteration], None]
