"""PPO's arithmetic against numbers worked by hand, and what must hold for all."""

import math

import pytest
import torch
from hypothesis import given
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
        logprobs, logprobs, torch.tensor([[5.0, 2.0, -1.0, 5.0]]), MASK, 0.2
    )
    assert losses[0].tolist() == [0.0, -2.0, 1.0, 0.0]
    assert clipped.sum() == 0


def test_a_ratio_past_the_clip_stops_pulling() -> None:
    new = torch.tensor([[0.0, math.log(1.5), math.log(0.5), 0.0]], requires_grad=True)
    losses, clipped = ppo_math.policy_loss(
        new, torch.zeros(1, 4), torch.tensor([[0.0, 1.0, -1.0, 0.0]]), MASK, clip=0.2
    )
    losses.sum().backward()
    assert losses[0].tolist() == pytest.approx([0.0, -1.2, 0.8, 0.0])
    assert clipped[0].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert new.grad is not None
    assert new.grad.abs().sum() == 0


def test_whitening_counts_real_tokens_alone() -> None:
    white = ppo_math.whiten(torch.tensor([[100.0, 1.0, 3.0, -100.0]]), MASK)
    assert white[0].tolist() == pytest.approx([0.0, -1.0, 1.0, 0.0], abs=1e-5)


def test_kl_estimators_by_hand() -> None:
    logprobs, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert ppo_math.kl_k1(logprobs, reference).item() == pytest.approx(math.log(2))
    assert ppo_math.kl_k3(logprobs, reference).item() == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize(("kl", "expected"), [(1.0, 0.095), (4.8, 0.096), (5.5, 0.11), (50.0, 0.13)])
def test_the_kl_coefficient_loosens_slowly_and_tightens_fast(kl: float, expected: float) -> None:
    assert ppo_math.adapt_kl_coefficient(0.1, kl, target=5.0) == pytest.approx(expected)


@given(
    rows=st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=4),
    padding=st.integers(0, 5),
)
def test_padding_changes_nothing(rows: list[list[float]], padding: int) -> None:
    def run(extra: int) -> list[torch.Tensor]:
        longest = max(map(len, rows)) + extra
        values = torch.tensor([row + [7.0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
        rewards = ppo_math.token_rewards(values[:, 0], values * mask, -values * mask, mask, 0.3)
        advantages, returns = ppo_math.gae(rewards, values, mask, 0.9, 0.95)
        white = ppo_math.whiten(advantages, mask)
        return [tensor[mask.bool()] for tensor in (rewards, advantages, returns, white)]

    for one, other in zip(run(0), run(padding), strict=True):
        torch.testing.assert_close(one, other)
