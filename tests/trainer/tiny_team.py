"""What each of two processes does in the tests of a team, one thing after the other, as a launcher starts it: see `test_team.py`."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from transformers.utils import logging

from service.settings import Tuning
from tests.trainer.tiny_cycle import RANK, learn_and_publish, open_gate
from tests.trainer.tiny_ppo import SETTINGS as PPO_SETTINGS
from tests.trainer.tiny_ppo import HalfFleet, start
from trainer import followers, ppo_math, ppo_run
from trainer.consensus import Consensus
from trainer.iterations import Iteration, NonFinite, Outcome
from trainer.models import Origin
from trainer.ppo import PPO
from trainer.rollouts import Rollout, Sampler
from trainer.team import Parted, Team
from trainer.whole import LEARNING_RATE_TIMES_WIDTH, load_roles

SETTINGS = replace(PPO_SETTINGS, iterations=4, rollouts=32, epochs=3, minibatch=16, microbatch=8, warmup=1)
CUT_OFF_AFTER = 1


class Killed(Exception):
    pass


def make_run(origin: Origin, team: Team) -> PPO:
    torch.manual_seed(0)
    settings = SETTINGS
    if origin.tuning == "full":
        settings = replace(SETTINGS, learning_rate_times_width=LEARNING_RATE_TIMES_WIDTH)
    return start(load_roles(origin), settings, team)


def train_together(origin: Origin, folder: Path, team: Team) -> None:
    """A whole run, and one that is cut off and taken up; each process writes down what it saw."""
    sampled, read = list[int](), list[list[Rollout]]()
    with pytest.MonkeyPatch.context() as patch:
        _count_sampled(patch, sampled)
        _keep_read(patch, read)
        run = make_run(origin, team)
        outcome = ppo_run.train(run, folder / "whole", lambda _: None)
    run_again = _cut_off_and_take_up(origin, folder / "cut", team)
    seen = _seen(outcome, run, sampled, read) | {"policy_taken_up": run_again.roles.policy_state()}
    torch.save(seen, folder / f"process-{team.rank}.pt")


def train_with_fleet(origin: Origin, folder: Path, team: Team) -> None:
    """A run of which the leader asks a fleet for the replies, which answers every second one."""
    sampled, read = list[int](), list[list[Rollout]]()
    run = make_run(origin, team)
    run.fleet = HalfFleet() if team.leads else None
    with pytest.MonkeyPatch.context() as patch:
        _count_sampled(patch, sampled)
        _keep_read(patch, read)
        outcome = ppo_run.train(run, folder / "fleet", lambda _: None)
    torch.save(_seen(outcome, run, sampled, read), folder / f"fleet-{team.rank}.pt")


def _seen(outcome: Outcome, run: PPO, sampled: list[int], read: list[list[Rollout]]) -> dict[str, Any]:
    return {
        "iterations": [asdict(iteration) for iteration in outcome.iterations],
        "policy": run.roles.policy_state(),
        "sampled": sampled,
        "rollouts": [[asdict(rollout) for rollout in rollouts] for rollouts in read],
    }


def _cut_off_and_take_up(origin: Origin, checkpoints: Path, team: Team) -> PPO:
    def cut_off(iteration: Iteration) -> None:
        if iteration.number == CUT_OFF_AFTER:
            raise Killed

    with pytest.raises(Killed):
        ppo_run.train(make_run(origin, team), checkpoints, cut_off)
    run = make_run(origin, team)
    ppo_run.train(run, checkpoints, lambda _: None)
    return run


def _count_sampled(patch: pytest.MonkeyPatch, sampled: list[int]) -> None:
    sample = Sampler.sample

    def counting(self: Sampler, model: Any, prompts: Any, generator: torch.Generator) -> list[Rollout]:
        sampled.append(len(prompts))
        return sample(self, model, prompts, generator)

    patch.setattr(Sampler, "sample", counting)


def _keep_read(patch: pytest.MonkeyPatch, read: list[list[Rollout]]) -> None:
    reading = PPO._read

    def keeping(self: PPO, rollouts: Any, sampled_here: bool) -> Any:
        read.append(list(rollouts))
        return reading(self, rollouts, sampled_here)

    patch.setattr(PPO, "_read", keeping)


def lead(origin: Origin, folder: Path, team: Team) -> None:
    """A run that its follower spoils, a whole cycle, and a run that the leader leaves on its own."""
    run = make_run(origin, team)
    with pytest.raises(NonFinite, match="loss became nan"), followers.called_to(run):
        ppo_run.train(run, folder / "spoilt", lambda _: None)
    assert team.in_step
    with pytest.MonkeyPatch.context() as patch:
        open_gate(patch)
        learn_and_publish(load_roles(origin), folder, team=team)

    def fail(_: Iteration) -> None:
        raise OSError("No space left on device")

    run = make_run(origin, team)
    with pytest.raises(OSError, match="No space"), followers.called_to(run):
        ppo_run.train(run, folder / "failed", fail)
    assert not team.in_step


def follow(folder: Path, team: Team) -> None:
    """Spoils its part of the first run's loss, and takes part in all that comes."""
    sampled, spoilt, knew = list[int](), iter([True]), list[bool]()
    loss, read = ppo_math.policy_loss, Consensus.read

    def spoil(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        losses, clipped = loss(*arguments)
        return losses * (float("nan") if next(spoilt, False) else 1.0), clipped

    def listen(self: Consensus, prompt: Any, pieces: Any) -> list[float]:
        knew.append(tuple(prompt) in self.known)
        return read(self, prompt, pieces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_math, "policy_loss", spoil)
        patch.setattr(Consensus, "read", listen)
        _count_sampled(patch, sampled)
        with pytest.raises(Parted):
            followers.follow(team)
    torch.save({"sampled": sampled, "knew": knew}, folder / "followed.pt")


def main() -> None:
    base, folder = map(Path, sys.argv[1:3])
    origin = Origin(base, RANK, tuning=cast(Tuning, sys.argv[3]))
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    team = Team.join()
    with pytest.MonkeyPatch.context() as patch:
        # bfloat16 would hide differences
        patch.setattr("trainer.models.compute_dtype", lambda _: torch.float32)
        train_together(origin, folder, team)
        train_with_fleet(origin, folder, team)
        if team.leads:
            lead(origin, folder, team)
            dist.destroy_process_group()
        else:
            follow(folder, team)


if __name__ == "__main__":
    main()
    # As the trainer's own process ends: gloo's threads may abort one that ends while they are left.
    os._exit(0)
