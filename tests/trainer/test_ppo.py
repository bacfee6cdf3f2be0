"""The loop on a tiny model: unchanged weights have ratio 1, a reward is learnt, and what is kept follows the judge."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_model import make_model
from tests.trainer.tiny_ppo import SETTINGS, HalfFleet, start
from trainer import ppo_math, ppo_run
from trainer.batches import Batch
from trainer.iterations import GapTooWide, Iteration, NonFinite, Outcome
from trainer.models import POLICY, Roles
from trainer.rollouts import Sampler
from trainer.team import Team


@pytest.fixture
def roles(tmp_path: Path) -> Roles:
    torch.manual_seed(0)
    return Roles.load(make_model(tmp_path), rank=4)


@pytest.mark.usefixtures("_in_bfloat16")
def test_unchanged_weights_have_a_ratio_of_exactly_one(roles: Roles) -> None:
    batch = Batch.collate([([5, 6], [7, 8, 1]), ([5], [9, 1])], roles.pad_id, roles.device)
    with torch.no_grad():
        assert torch.equal(roles.logprobs(batch), roles.logprobs(batch))
        assert torch.equal(roles.logprobs(batch), roles.read(batch).logprobs)  # a new adapter changes nothing


def test_logprobs_agree_with_the_models_own_loss(roles: Roles) -> None:
    prompt, reply = [5, 6, 7], [40, 41, 1]
    batch = Batch.collate([(prompt, reply), (prompt * 3, reply)], roles.pad_id, roles.device)
    labels = torch.tensor([[-100] * 3 + reply])
    with torch.no_grad(), roles.acting_as(POLICY):
        loss = roles.model(input_ids=torch.tensor([prompt + reply]), labels=labels).loss
        total = roles.logprobs(batch)[0].sum()
    assert total.item() == pytest.approx(-3 * loss.item(), rel=2e-2)


def test_the_samplers_logprobs_are_the_trainers(roles: Roles) -> None:
    sampler = Sampler(roles.end_ids, max_tokens=8)
    with roles.acting_as(POLICY):
        rollouts = sampler.sample(roles.model, [[5, 6, 7], [9]], torch.Generator().manual_seed(1))
    for rollout in rollouts:
        batch = Batch.collate([(rollout.prompt_ids, rollout.reply_ids)], roles.pad_id, roles.device)
        with torch.no_grad():
            again = roles.logprobs(batch)[0, len(rollout.prompt_ids) :]
        torch.testing.assert_close(again, torch.tensor(rollout.logprobs), atol=0.1, rtol=0.05)


def test_a_sampler_never_draws_what_is_too_unlikely(roles: Roles) -> None:
    prompts = [[5, 6, 7]] * 64
    with roles.acting_as(POLICY):
        free = Sampler(roles.end_ids, max_tokens=1).sample(
            roles.model, prompts, torch.Generator().manual_seed(1)
        )
        likeliest = max(rollout.logprobs[0] for rollout in free)
        filtered = Sampler(roles.end_ids, max_tokens=1, min_p=0.9).sample(
            roles.model, prompts, torch.Generator().manual_seed(1)
        )
    assert min(rollout.logprobs[0] for rollout in free) < likeliest + math.log(0.9)
    assert min(rollout.logprobs[0] for rollout in filtered) >= likeliest + math.log(0.9)


def test_a_reward_is_learnt_and_the_anchor_stays_as_it_is(roles: Roles, tmp_path: Path) -> None:
    before = {
        name: weights.clone() for name, weights in roles.model.named_parameters() if ".policy." not in name
    }
    outcome = ppo_run.train(start(roles), tmp_path / "checkpoints", lambda _: None)
    assert outcome.iterations[0].kl == pytest.approx(0.0, abs=1e-6)
    assert outcome.iterations[-1].score > outcome.iterations[0].score + 0.3
    assert outcome.iterations[-1].kl > 0.01
    assert all(
        torch.equal(weights, before[name])
        for name, weights in roles.model.named_parameters()
        if name in before
    )


def test_the_same_seed_gives_the_same_policy(tmp_path: Path) -> None:
    base = make_model(tmp_path)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        roles = Roles.load(base, rank=4)
        start(roles).iterate(0)
        states.append(roles.policy_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Killed(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_to_the_same_policy(tmp_path: Path) -> None:
    base = make_model(tmp_path)

    def train(checkpoints: Path, cut_off_after: int | None = None) -> tuple[Roles, Outcome]:
        def watch(iteration: Iteration) -> None:
            if iteration.number == cut_off_after:
                raise Killed

        torch.manual_seed(0)
        roles = Roles.load(base, rank=4)
        return roles, ppo_run.train(start(roles), checkpoints, watch)

    whole, told = train(tmp_path / "whole")
    for number in (0, 2):
        with pytest.raises(Killed):
            train(tmp_path / "cut", cut_off_after=number)
    resumed, retold = train(tmp_path / "cut")
    assert told == retold
    assert len(told.iterations) > 3
    expected, found = whole.policy_state(), resumed.policy_state()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("002.pt", "004.pt"):
        one, two = (torch.load(tmp_path / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_that_was_cut_off_with_another_rank_begins_anew_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    base, checkpoints = make_model(tmp_path), tmp_path / "checkpoints"
    settings = replace(SETTINGS, iterations=3, rollouts=16)
    ppo_run.train(start(Roles.load(base, rank=4), settings), checkpoints, lambda _: None)
    (checkpoints / "002.partial").touch()
    run = start(Roles.load(base, rank=2), replace(settings, iterations=2))
    outcome = ppo_run.train(run, checkpoints, lambda _: None)
    assert [iteration.number for iteration in outcome.iterations] == [0, 1]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000.pt", "001.pt", "under-way.pt"]


def test_what_the_fleet_does_not_answer_is_sampled_here_in_the_prompts_order(roles: Roles) -> None:
    run = start(roles)
    run.fleet = fleet = HalfFleet()
    prompts = [[5, 6 + number] for number in range(9)]
    found = run._sample_missing(prompts, run._ask_fleet(prompts))
    assert [rollout.prompt_ids for rollout in found] == prompts
    assert found[::2] == fleet.replies
    with roles.acting_as(POLICY):
        here = run.sampler.sample(roles.model, prompts[1::2], start(roles).generator)
    assert found[1::2] == here


def test_replies_of_another_policy_end_the_run_before_it_learns_from_them(roles: Roles) -> None:
    run = start(roles)
    run.iterate(0)  # its own are not too far off
    before = roles.policy_state()
    run.fleet = HalfFleet(off=0.5)  # half of the replies
    with pytest.raises(GapTooWide, match=r"differ by 0\.2.* nats a token, and 0.1 are allowed"):
        run.iterate(5)
    assert all(torch.equal(weights, before[name]) for name, weights in roles.policy_state().items())


def test_what_is_sampled_here_cannot_be_stale_and_no_gap_ends_the_run(roles: Roles) -> None:
    run = start(roles, replace(SETTINGS, most_gap=0.0))
    assert run.iterate(0).gap > 0.0
    run.fleet = HalfFleet()
    with pytest.raises(GapTooWide):
        run.iterate(1)


@pytest.mark.usefixtures("_exact")
def test_the_samplers_word_is_taken_where_it_rounds_as_the_trainer_does(roles: Roles) -> None:
    run = start(roles)
    rollouts = run._sample_here([*run.prompts] * 32)
    first, *others = run._read(rollouts, sampled_here=True)
    assert others
    assert all(part.trusted for part in others)
    assert not first.trusted  # one microbatch is always looked at
    assert not any(part.trusted for part in run._read(rollouts))
    for part in others:
        again = roles.logprobs(part.batch).detach()
        torch.testing.assert_close(part.old, again, atol=1e-4, rtol=0.0)
    assert run._measure(0, [first, *others])["gap"] == run._gap([first]) > 0.0


@pytest.mark.usefixtures("_exact")
def test_its_word_is_not_taken_where_it_is_off(roles: Roles) -> None:
    run = start(roles)
    rollouts = run._sample_here([*run.prompts] * 32)
    off = [replace(each, logprobs=[found - 0.02 for found in each.logprobs]) for each in rollouts]
    assert not any(part.trusted for part in run._read(off, sampled_here=True))


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize(("times", "weight"), [(1.0, 1.0), (1.5, 1.5), (0.25, 0.25), (9.0, 2.0)])
def test_the_loss_is_weighted_by_how_much_likelier_the_policy_finds_a_token_than_its_sampler_did(
    times: float, weight: float, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[list[torch.Tensor]] = []

    def keep(_: Team, parameters: Sequence[torch.nn.Parameter]) -> None:
        gradients.append([each.grad.clone() for each in parameters if each.grad is not None])

    monkeypatch.setattr(Team, "sum_gradients", keep)
    run = start(roles)
    [part, *_] = run._read(run._sample_here([*run.prompts] * 4))
    part.advantages = part.old.sin() * part.mask
    run.optimizer.param_groups[0]["lr"] = 0.0
    for sampled in (part.old, part.old - math.log(times)):
        part.sampled = sampled
        run._update([part])
    for plain, weighted in zip(*gradients, strict=True):
        torch.testing.assert_close(weighted, weight * plain, rtol=1e-3, atol=1e-5)
    assert any(plain.abs().max() > 0.01 for plain in gradients[0])


def test_a_loss_that_is_no_number_ends_the_run(roles: Roles) -> None:
    training = start(roles)
    training.ensemble = replace(training.ensemble, offset=torch.tensor([float("nan")]))
    with pytest.raises(NonFinite, match="loss became nan"):
        training.iterate(0)


def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_in_the_weights(
    roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(roles)
    before = roles.policy_state()
    loss = ppo_math.policy_loss

    def flat_but_steep(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        losses, clipped = loss(*arguments)
        return losses + (losses * 0).abs().sqrt(), clipped  # at 0 a root is 0, and its slope is infinite

    monkeypatch.setattr(ppo_math, "policy_loss", flat_but_steep)
    with pytest.raises(NonFinite, match="gradient became nan"):
        training.iterate(3)
    assert all(torch.equal(weights, before[name]) for name, weights in roles.policy_state().items())


def test_a_team_that_cannot_share_evenly_is_told_which_could(roles: Roles) -> None:
    with pytest.raises(
        ValueError, match=r"64 rollouts in microbatches of 16 .* 3 processes: start 1, 2, 4, 8, 16"
    ):
        start(roles, team=Team(rank=0, size=3))


def test_steps_grow_over_the_warm_up_and_shrink_after_it(roles: Roles) -> None:
    run = start(roles, replace(SETTINGS, iterations=10, warmup=2, rollouts=16, last_learning_rate=0.0))
    rates = []
    for number in (0, 1, 2, 9):
        run.iterate(number)
        rates.append(run.optimizer.param_groups[0]["lr"] / run.learning_rate)
    assert rates == pytest.approx([0.0, 0.45, 0.8, 0.1])


def test_one_unlikely_token_does_not_move_what_kl_is_steered_by() -> None:
    likely, unlikely = torch.tensor([-1.0]), torch.tensor([-9.0])
    assert ppo_math.kl_k3(unlikely, likely).item() > 1000
    assert ppo_math.kl_k1(unlikely, likely).item() == -8.0


def test_rollouts_are_passed_over_no_more_once_the_policy_has_moved_away_from_them(roles: Roles) -> None:
    for weights in roles.policy_parameters():
        torch.nn.init.normal_(weights, std=0.02, generator=torch.Generator().manual_seed(0))
    settings = replace(SETTINGS, epochs=4, warmup=1)
    whole = start(roles, replace(settings, most_moved=100.0)).iterate(1)
    cut = start(roles, replace(settings, most_moved=0.0)).iterate(1)
    assert (whole.passes, cut.passes) == (4, 1)


def test_no_reply_scores_more_than_a_bound_whatever_the_heads_say_of_it(
    roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(roles, replace(SETTINGS, fault_penalty=0.0, most_score=3.0))
    far = replace(run.ensemble, offset=torch.tensor([1000.0]))
    monkeypatch.setattr(run, "ensemble", far)
    assert run.iterate(0).score == pytest.approx(-3.0)
    monkeypatch.setattr(run, "ensemble", replace(far, offset=torch.tensor([-1000.0])))
    assert run.iterate(1).score == pytest.approx(3.0)
