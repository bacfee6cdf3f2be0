"""Ratchet's PPO on a job of the benchmark: `trainer.ppo.PPO` as the cycle runs it, with reward heads of fixed weights."""

from dataclasses import replace

import torch

from tests.benchmarks.ppo_visit import Clock, Figures, Job, Memory, answer
from trainer.consensus import Asked, Consensus
from trainer.features import num_features
from trainer.iterations import Iteration
from trainer.models import Roles, compute_dtype
from trainer.passes import memory as memory_of_process
from trainer.ppo import PPO, PPOSettings
from trainer.reward_model import Head, RewardSettings


def work(job: Job) -> Figures:
    """Raises ValueError where a reply was not of full length."""
    memory_of_process.keep_freed()  # as the trainer's process does
    torch.manual_seed(0)
    roles = Roles.load(job.base, job.rank, layers=job.layers)
    # As if the anchor had been asked, which a cycle does once, before PPO: reading what replies have of it is PPO's.
    roles.consensus = Consensus.of(
        {tuple(ids): Asked("", [roles.decode(other) for other in job.prompts[:8]]) for ids in job.prompts}
    )
    memory = Memory()
    settings = replace(
        PPOSettings(),
        rollouts=job.samples,
        epochs=job.epochs,
        minibatch=job.minibatch,
        max_tokens=job.reply_tokens,
    )
    ensemble, judge = (make_head(roles, RewardSettings().members, seed) for seed in range(2))
    ppo = PPO(roles, ensemble, judge, job.prompts, settings, seed=0)
    clock = Clock()
    for number in range(job.iterations + 1):
        check(ppo.iterate(number), job)
        clock.tick()
    trained = sum(parameter.numel() for parameter in roles.policy_parameters())
    dtype = str(compute_dtype(roles.device)).removeprefix("torch.")
    return Figures(clock.seconds, clock.cpu_seconds, memory.idle_mib, memory.peak_mib, trained, dtype)


def make_head(roles: Roles, members: int, seed: int) -> Head:
    """Random directions, scores of about unit variance."""
    features = num_features(roles.hidden_size)
    weight = torch.randn(features, members, generator=torch.Generator().manual_seed(seed))
    return Head(torch.ones(features), weight / features, torch.zeros(members), torch.ones(members))


def check(iteration: Iteration, job: Job) -> None:
    """Both contestants must have done the same work."""
    if iteration.length != job.reply_tokens or iteration.ended:
        raise ValueError(
            f"Replies of {iteration.length} tokens, and {iteration.ended:.0%} ended by themselves."
        )


if __name__ == "__main__":
    answer(work)
