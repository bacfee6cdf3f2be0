"""What the processes do that do not lead: they wait for a PPO run, and take part in it as the leader's equals.

All else of a cycle is the leader's alone (votes, reward models, gate, files, rows): it takes seconds, and needs no second opinion.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.consensus import Consensus
from trainer.iterations import Unsound
from trainer.models import Origin
from trainer.ppo import PPO, PPOSettings
from trainer.ppo_run import train
from trainer.reward_model import Head
from trainer.team import Team
from trainer.whole import load_roles

NOWHERE = Path()
"""Followers write no checkpoints."""


@dataclass(frozen=True, slots=True)
class Job:
    """A PPO run before it begins: all that the leader's depends on."""

    origin: Origin
    policy: dict[str, Tensor]
    consensus: Consensus
    ensemble: Head
    judge: Head
    prompts: Sequence[list[int]]
    settings: PPOSettings
    seed: int


@contextmanager
def called_to(run: PPO) -> Iterator[None]:
    """For the leader: what it does within, `train` of this run, its followers do too."""
    team = run.team
    if team.size == 1:
        yield
        return
    roles = run.roles
    team.tell(
        Job(
            origin=roles.origin,
            policy=roles.policy_state(),
            consensus=roles.consensus,
            ensemble=run.ensemble,
            judge=run.judge,
            prompts=run.prompts,
            settings=run.settings,
            seed=run.seed,
        )
    )
    try:
        yield
    except Unsound:  # which all of them raise
        raise
    except BaseException:
        team.in_step = False
        raise


def follow(team: Team) -> None:
    """Takes part in one run after the other, until the leader tells that there are no more (None)."""
    while (job := team.tell(None)) is not None:
        origin: Origin = job.origin
        roles = load_roles(origin, team.device)
        roles.load_policy_state(job.policy)
        roles.consensus = job.consensus
        run = PPO(roles, job.ensemble, job.judge, job.prompts, job.settings, job.seed, team)
        with suppress(Unsound):
            train(run, NOWHERE, lambda iteration: None)
