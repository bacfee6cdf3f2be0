"""PPO's arithmetic against numbers worked by hand, and what must hold for all."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import ppo_math

MASK = torch.tensor([[0.0, 1.0, 1.0, 0.0]])


def test_the_score_stands_on_the_last_real_token_and_the_penalty_on_each() -> None:
    rewards = ppo_math.token_rewards(
        scores=torch.tensor([2.0]),
        logprobs=torch.tensor([[0.0, -1.0, -0.5, 0.0]]),
        reference=torch.tensor([[0.0, -2.0, -0.25, 0.0]]),
        mask=MASK,
        kl_coefficient=0.1,
    )
    assert rewards[0].tolist() == pytest.approx([0.0, -0.1, 2.025, 0.0])


def test_advantages_by_hand() -> None:
    # delta_2 = 1 - .4 = .6; delta_1 = 0 + .5 * .4 - .2 = 0; advantage_1 = 0 + .5 * .8 * .6 = .24
    advantages, returns = ppo_math.gae(
        rewards=torch.tensor([[0.0, 0.0, 1.0, 0.0]]),
        values=torch.tensor([[9.0, 0.2, 0.4, 9.0]]),
        mask=MASK,
        discount=0.5,
        trace=0.8,
    )
    assert advantages[0].tolist() == pytest.approx([0.0, 0.24, 0.6, 0.0])
    assert returns[0].tolist() == pytest.approx([0.0, 0.44, 1.0, 0.0])


def test_the_loss_of_unchanged_weights_is_minus_the_advantage() -> None:
    logprobs = torch.tensor([[0.0, -1.3, -0.2, 0.0]])
    losses, clipped = ppo_math.policy_loss(
        logprobs, logprobs, torch.tensor([[5.0, 2.0, -1.0, 5.0]]), MASK, 0.2, 0.2
    )
    assert losses[0].tolist() == [0.0, -2.0, 1.0, 0.0]
    assert clipped.sum() == 0


def test_a_ratio_past_the_clip_stops_pulling() -> None:
    new = torch.tensor([[0.0, math.log(1.5), math.log(0.5), 0.0]], requires_grad=True)
    losses, clipped = ppo_math.policy_loss(
        new, torch.zeros(1, 4), torch.tensor([[0.0, 1.0, -1.0, 0.0]]), MASK, below=0.2, above=0.4
    )
    losses.sum().backward()
    assert losses[0].tolist() == pytest.approx([0.0, -1.4, 0.8, 0.0])
    assert clipped[0].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert new.grad is not None
    assert new.grad.abs().sum() == 0


def test_whitening_counts_real_tokens_alone() -> None:
    white = ppo_math.whiten(torch.tensor([[100.0, 1.0, 3.0, -100.0]]), MASK)
    assert white[0].tolist() == pytest.approx([0.0, -1.0, 1.0, 0.0], abs=1e-5)


def test_importance_weights_and_gaps_by_hand() -> None:
    # p / q: .5 / .4 = 1.25; .9 / .3 = 3, which is cut to 2; .1 / .2 = .5
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]])
    trained = torch.tensor([[0.3, 0.5, 0.9, 0.1, 0.3]]).log().requires_grad_()
    sampled = torch.tensor([[0.7, 0.4, 0.3, 0.2, 0.9]]).log()
    weights = ppo_math.importance_weights(trained, sampled, mask, most=2.0)
    assert weights[0].tolist() == pytest.approx([0.0, 1.25, 2.0, 0.5, 0.0])
    assert not weights.requires_grad
    gaps = ppo_math.gaps(trained, sampled, mask)
    assert gaps[0].tolist() == pytest.approx([0.0, math.log(1.25), math.log(3), math.log(2), 0.0])
    mean = (math.log(1.25) + math.log(3) + math.log(2)) / 3
    assert ppo_math.masked_mean(gaps, mask).item() == pytest.approx(mean)


def test_kl_estimators_by_hand() -> None:
    logprobs, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert ppo_math.kl_k1(logprobs, reference).item() == pytest.approx(math.log(2))
    assert ppo_math.kl_k3(logprobs, reference).item() == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize(
    ("kl", "expected"), [(1.0, 0.09), (4.8, 0.096), (5.5, 0.11), (8.0, 0.16), (50.0, 0.2)]
)
def test_the_kl_coefficient_loosens_slowly_and_tightens_fast(kl: float, expected: float) -> None:
    assert ppo_math.adapt_kl_coefficient(0.1, kl, target=5.0) == pytest.approx(expected)


ANY_TIME = settings(deadline=None)
"""The first call of an operation in torch can take a second on a busy machine."""
ROWS = st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=4)
"""Replies of different lengths, a number for each token."""


def lay_out(rows: list[list[float]], before: int = 0, after: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, nonsense around the replies, and mask: (B, L), with columns for prompts and padding."""
    longest = max(map(len, rows)) + after
    values = torch.tensor([[-5.0] * before + row + [7.0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[0.0] * before + [1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
    return values, mask


@ANY_TIME
@given(rows=ROWS, before=st.integers(0, 3), after=st.integers(0, 5))
def test_prompts_and_padding_change_nothing(rows: list[list[float]], before: int, after: int) -> None:
    def run(before: int, after: int) -> list[torch.Tensor]:
        values, mask = lay_out(rows, before, after)
        scores = torch.tensor([row[0] for row in rows])
        rewards = ppo_math.token_rewards(scores, values * mask, -values * mask, mask, 0.3)
        advantages, returns = ppo_math.gae(rewards, values, mask, 0.9, 0.95)
        white = ppo_math.whiten(advantages, mask)
        losses, clipped = ppo_math.policy_loss(values, values / 2, advantages, mask, 0.2, 0.2)
        weights = ppo_math.importance_weights(values, values.sin(), mask, 2.0)
        gaps = ppo_math.gaps(values, values.sin(), mask)
        results = [rewards, advantages, returns, white, losses, clipped, weights, gaps]
        assert all((tensor[mask == 0] == 0).all() for tensor in results)
        return [*(tensor[mask.bool()] for tensor in results), ppo_math.masked_mean(values, mask)]

    for one, other in zip(run(0, 0), run(before, after), strict=True):
        torch.testing.assert_close(one, other)


@ANY_TIME
@given(rows=ROWS, scale=st.floats(0.01, 100))
def test_unchanged_weights_have_a_ratio_of_exactly_one(rows: list[list[float]], scale: float) -> None:
    values, mask = lay_out(rows, before=1, after=1)
    advantages = values.flip(0, 1) * mask
    losses, clipped = ppo_math.policy_loss(scale * values, scale * values, advantages, mask, 0.2, 0.2)
    assert torch.equal(losses, -advantages)
    assert not clipped.any()


@ANY_TIME
@given(rows=ROWS, shift=st.floats(-1, 1))
def test_a_clipped_loss_is_never_better_than_the_unclipped_one(rows: list[list[float]], shift: float) -> None:
    values, mask = lay_out(rows)
    losses, clipped = ppo_math.policy_loss(values + shift * values.cos(), values, values, mask, 0.2, 0.2)
    plain = -values * torch.exp((shift * values.cos()) * mask) * mask
    assert (losses >= plain - 1e-4 * plain.abs()).all()
    assert (losses[clipped == 0] <= plain[clipped == 0] + 1e-4 * plain[clipped == 0].abs()).all()


@ANY_TIME
@given(rows=ROWS)
def test_without_discounts_a_return_is_the_sum_of_what_comes(rows: list[list[float]]) -> None:
    rewards, mask = lay_out(rows, before=1, after=2)
    values = rewards.roll(1, dims=0)  # any will do
    _, returns = ppo_math.gae(rewards * mask, values, mask, discount=1.0, trace=1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_come, atol=1e-4, rtol=1e-4)


@ANY_TIME
@given(rows=ROWS, coefficient=st.floats(0, 2))
def test_the_rewards_of_a_reply_are_its_score_less_its_kl(
    rows: list[list[float]], coefficient: float
) -> None:
    values, mask = lay_out(rows, before=2, after=1)
    scores = torch.tensor([row[-1] for row in rows])
    rewards = ppo_math.token_rewards(scores, values, values / 3, mask, coefficient)
    kl = (ppo_math.kl_k1(values, values / 3) * mask).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - coefficient * kl, atol=1e-4, rtol=1e-4)


@ANY_TIME
@given(rows=ROWS, most=st.floats(1, 4))
def test_importance_weights_are_one_where_nothing_differs_and_never_past_their_bound(
    rows: list[list[float]], most: float
) -> None:
    values, mask = lay_out(rows, before=1, after=2)
    assert torch.equal(ppo_math.importance_weights(values, values, mask, most), mask)
    weights = ppo_math.importance_weights(values, values.sin(), mask, most)
    assert (weights >= 0).all()
    assert (weights <= most).all()
    whole = torch.exp(values - values.sin())
    untouched = (weights < most) & mask.bool()
    torch.testing.assert_close(weights[untouched], whole[untouched])


@ANY_TIME
@given(rows=ROWS)
def test_k3_is_never_negative(rows: list[list[float]]) -> None:
    values, _ = lay_out(rows)
    assert (ppo_math.kl_k3(values, values.sin()) >= -1e-6).all()


@ANY_TIME
@given(rows=ROWS, shift=st.floats(-10, 10))
def test_whitening_leaves_mean_zero_and_at_most_unit_variance(rows: list[list[float]], shift: float) -> None:
    values, mask = lay_out(rows, before=1, after=1)
    white = ppo_math.whiten(values, mask)
    real = white[mask.bool()]
    # of numbers that are all the same, what is left by rounding is divided by the least deviation, 1e-4
    assert real.mean().item() == pytest.approx(0, abs=1e-2)
    assert real.square().mean().item() <= 1.001
    if values[mask.bool()].var(correction=0) > 0.01:
        assert real.square().mean().item() == pytest.approx(1, abs=1e-3)
        torch.testing.assert_close(ppo_math.whiten(values + shift, mask), white, atol=1e-3, rtol=1e-3)
