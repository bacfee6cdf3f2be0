"""Two processes train the policy that one would have trained on the same rollouts; and what becomes of them when one of them fails."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from service.policies import read_folder
from service.settings import Tuning
from tests.tiny_model import make_model
from tests.trainer.tiny_cycle import NAME, RANK, RECIPE, policies_in
from tests.trainer.tiny_team import SETTINGS, make_run
from trainer import ppo_run
from trainer.models import Origin
from trainer.rollouts import Rollout, Sampler
from trainer.team import ALONE

LAUNCH = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
"""As on GPUs; where there are none, the processes find each other by gloo."""
SECONDS = 1800.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["lora", "full"])
def tuning(request: pytest.FixtureRequest) -> Tuning:
    found: Tuning = request.param
    return found


@pytest.fixture(scope="module")
def folder(base: Path, tuning: Tuning, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have done all that `tiny_team.py` says."""
    made = tmp_path_factory.mktemp("team")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, *LAUNCH, "-m", "tests.trainer.tiny_team", str(base), str(made), tuning]
    ended = subprocess.run(
        command, env=environment, timeout=SECONDS, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return made


def read(folder: Path, rank: int, run: str = "process") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{run}-{rank}.pt")
    return found


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize("sampled_by", ["process", "fleet"])
def test_two_processes_train_what_one_would_have_trained_on_the_same_rollouts(
    sampled_by: str, base: Path, tuning: Tuning, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = read(folder, 0, sampled_by)
    rollouts = iter(together["rollouts"])

    def replay(self: Sampler, model: Any, prompts: Any, generator: torch.Generator) -> list[Rollout]:
        found = [Rollout(**rollout) for rollout in next(rollouts)]
        assert [rollout.prompt_ids for rollout in found] == prompts
        return found

    monkeypatch.setattr(Sampler, "sample", replay)
    run = make_run(Origin(base, RANK, tuning=tuning), ALONE)
    before = run.roles.policy_state()
    outcome = ppo_run.train(run, tmp_path, lambda _: None)
    for alone, both in zip(outcome.iterations, together["iterations"], strict=True):
        assert (alone.guard, both.pop("guard")) == (None, None)
        assert both.pop("judges") == pytest.approx(alone.judges, rel=1e-4, abs=1e-5)
        numbers = {name: getattr(alone, name) for name in both}
        assert both == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    moved = sum((weights - before[name]).norm() for name, weights in run.roles.policy_state().items())
    apart = sum(
        (weights - together["policy"][name]).norm() for name, weights in run.roles.policy_state().items()
    )
    assert apart < 1e-3 * moved


def test_each_samples_and_both_know_the_same(folder: Path) -> None:
    leader, follower = read(folder, 0), read(folder, 1)
    half = SETTINGS.rollouts // 2
    assert leader["sampled"] == follower["sampled"] == [half] * SETTINGS.iterations
    first = [rollout["reply_ids"] for rollout in leader["rollouts"][0]]
    assert first[::2] != first[1::2]  # not the same random numbers
    assert leader["iterations"] == follower["iterations"]
    assert all(torch.equal(leader["policy"][name], follower["policy"][name]) for name in leader["policy"])


def test_the_leader_asks_the_fleet_and_all_of_them_sample_what_it_does_not_answer(folder: Path) -> None:
    leader, follower = read(folder, 0, "fleet"), read(folder, 1, "fleet")
    asked, quarter = SETTINGS.rollouts // 2, SETTINGS.rollouts // 4
    assert leader["sampled"] == [asked, quarter] * SETTINGS.iterations  # the fake asks the same model
    assert follower["sampled"] == [quarter] * SETTINGS.iterations
    assert leader["rollouts"] == follower["rollouts"]
    assert leader["iterations"] == follower["iterations"]
    assert all(torch.equal(leader["policy"][name], follower["policy"][name]) for name in leader["policy"])


def test_a_run_that_was_cut_off_goes_on_to_the_same_policy(folder: Path) -> None:
    for seen in (read(folder, 0), read(folder, 1)):
        for name, weights in seen["policy"].items():
            assert torch.equal(weights, seen["policy_taken_up"][name])


def test_a_whole_cycle_publishes_one_policy_though_a_run_before_it_was_spoilt(folder: Path) -> None:
    [published] = policies_in(folder).glob("policy-*")
    manifest = read_folder(NAME, published, merged=True)
    assert manifest.probe
    followed = torch.load(folder / "followed.pt")
    sampled: list[int] = followed["sampled"]
    assert followed["knew"]
    assert all(followed["knew"])  # what the anchor says when it is surest
    half = RECIPE.policy.rollouts // 2
    spoilt, *cycle, failed = sampled
    assert (spoilt, failed) == (SETTINGS.rollouts // 2, SETTINGS.rollouts // 2)
    assert cycle == [half] * RECIPE.policy.iterations
