"""SFT on a tiny model: held-out loss falls, the best epoch is kept, the anchor stays, the same seed gives the same bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_model import make_model
from trainer import sft
from trainer.iterations import NonFinite, checkpoint_path
from trainer.models import Roles
from trainer.preferences import Demonstrated, Source
from trainer.sft import Epoch, SFTSettings

SETTINGS = SFTSettings(epochs=4, batch=4, learning_rate_times_width=0.6)
SHOWN = [
    Demonstrated(
        [3, 70 + n % 30, 100 + n, 4], [40, 60 + n % 3, 61, 1][: 3 + n % 2], Source(f"group {n // 2}")
    )
    for n in range(24)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def roles(base: Path) -> Roles:
    torch.manual_seed(0)
    return Roles.load(base, rank=4)


def train(
    roles: Roles, folder: Path, shown: list[Demonstrated] = SHOWN, settings: SFTSettings = SETTINGS
) -> sft.Tuned:
    return sft.train(roles, shown, settings, 0, folder, lambda _: None)


def held_out_of(shown: list[Demonstrated]) -> list[Demonstrated]:
    return sft.split(shown, SETTINGS.held_out, seed=0)[1]


def test_the_held_out_loss_falls_and_nothing_but_the_adapter_changes(
    roles: Roles, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    frozen = {
        name: weights.clone() for name, weights in roles.model.named_parameters() if ".policy." not in name
    }
    seen: list[Epoch] = []
    tuned = sft.train(roles, SHOWN, SETTINGS, 0, tmp_path, seen.append)
    assert tuned.epochs[tuned.kept].held_out_loss < tuned.epochs[0].held_out_loss - 1.0
    assert seen == tuned.epochs
    now = dict(roles.model.named_parameters())
    assert all(torch.equal(now[name], weights) for name, weights in frozen.items())
    assert not any(module.training for module in roles.modules())
    assert capfd.readouterr() == ("", "")
    assert len(list(tmp_path.rglob("*"))) == len(tuned.epochs)


def test_the_loss_is_on_the_reply_alone(roles: Roles) -> None:
    row = sft._as_row(Demonstrated([5, 6], [40, 1], Source("")))
    assert row == {"input_ids": [5, 6, 40, 1], "labels": [-100, -100, 40, 1]}


def test_the_epoch_with_the_least_held_out_loss_is_kept(roles: Roles, tmp_path: Path) -> None:
    """Replies to the held-out prompts contradict the others: soon every epoch makes them less likely."""
    groups = {each.source.group for each in held_out_of(SHOWN)}
    shown = [replace(each, reply=[90, 91, 1]) if each.source.group in groups else each for each in SHOWN]
    tuned = train(roles, tmp_path, shown, replace(SETTINGS, learning_rate_times_width=2.0))
    losses = [epoch.held_out_loss for epoch in tuned.epochs]
    assert losses[tuned.kept] == min(losses) < losses[-1]
    assert tuned.why == "the held-out loss was no lower for 2 epochs"
    kept = torch.load(checkpoint_path(tmp_path, tuned.kept), weights_only=True)
    assert all(torch.equal(weights, kept[name]) for name, weights in roles.policy_state().items())
    assert sft.measure_loss(roles, held_out_of(shown)) == losses[tuned.kept]


def test_all_demonstrations_on_one_prompt_fall_on_the_same_side() -> None:
    training, held_out = sft.split(SHOWN, 0.2, seed=1)
    assert not {each.source.group for each in training} & {each.source.group for each in held_out}
    assert len(held_out) == 6
    assert len(training) + len(held_out) == len(SHOWN)


def test_the_same_seed_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    files = []
    for number in range(2):
        torch.manual_seed(0)
        tuned = train(Roles.load(base, rank=4), tmp_path / str(number))
        torch.manual_seed(number)  # what others draw changes nothing
        files.append(checkpoint_path(tmp_path / str(number), len(tuned.epochs) - 1).read_bytes())
    assert files[0] == files[1]


def test_a_loss_that_is_no_number_ends_the_run(roles: Roles, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="loss became nan"):
        train(roles, tmp_path, settings=replace(SETTINGS, learning_rate_times_width=float("inf")))


def test_a_weight_that_is_no_number_ends_the_run(roles: Roles, tmp_path: Path) -> None:
    with torch.no_grad():
        roles.policy_parameters()[0].fill_(float("nan"))
    with pytest.raises(NonFinite, match="weight became no number"):
        train(roles, tmp_path)


@pytest.mark.parametrize("shown", [[], SHOWN[:1], SHOWN[:2]])
def test_demonstrations_on_fewer_than_two_prompts_are_refused(
    shown: list[Demonstrated], roles: Roles, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"on [01] prompts, and 2 are needed"):
        train(roles, tmp_path, shown)
