"""The loss against its table, intervals against known values, and that heads learn what votes say."""

import math
from pathlib import Path

import pytest
import torch

from tests.tiny_model import make_model
from trainer import reward_model
from trainer.models import Roles
from trainer.reward_model import Pair


@pytest.mark.parametrize(
    ("margin", "loss"), [(0.0, 0.6931), (1.0, 0.3133), (3.0, 0.0486), (-1.0, 1.3133), (-8.0, 8.0003)]
)
def test_the_loss_is_minus_log_sigmoid_of_the_margin(margin: float, loss: float) -> None:
    assert reward_model.pair_loss(torch.tensor([margin]), torch.ones(1)).item() == pytest.approx(
        loss, abs=1e-4
    )


def test_a_tie_pulls_the_margin_to_nothing() -> None:
    margin = torch.tensor([1.5], requires_grad=True)
    reward_model.pair_loss(margin, torch.tensor([0.5])).backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(1 / (1 + math.exp(-1.5)) - 0.5)


def test_wilsons_interval() -> None:
    low, high = reward_model.wilson(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert reward_model.wilson(0, 0) == (0.0, 1.0)


def test_votes_on_one_prompt_stay_on_one_side() -> None:
    pairs = [Pair([1], [2], [3], 1.0, str(index // 3)) for index in range(30)]
    train, held_out = reward_model.split(pairs, 0.2, seed=3)
    assert len(train) + len(held_out) == 30
    assert len(held_out) == 6
    assert not {pair.group for pair in train} & {pair.group for pair in held_out}


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    folder: Path = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    return Roles.load(folder, rank=4)


def test_heads_learn_what_votes_say_and_are_the_same_every_time(roles: Roles) -> None:
    liked, disliked = roles.reply_ids("yes yes"), roles.reply_ids("no")
    prompts = [roles.prompt_ids([{"role": "user", "content": f"question {n}"}]) for n in range(24)]
    pairs = [
        Pair(prompt, *((liked, disliked, 1.0) if n % 2 else (disliked, liked, 0.0)), str(n))
        for n, prompt in enumerate(prompts)
    ]
    own = reward_model.read_features(
        roles, [(prompt, liked if n % 3 else disliked) for n, prompt in enumerate(prompts)]
    )
    head = reward_model.fit(roles, pairs[:16], own, members=4, seed=1)
    assert reward_model.measure_accuracy(roles, head, pairs[16:]).share == 1.0
    again = reward_model.fit(roles, pairs[:16], own, members=4, seed=1)
    assert torch.equal(head.weight, again.weight)
    scores = head(own)
    torch.testing.assert_close(scores.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.std(0), torch.ones(4))


def test_features_do_not_depend_on_the_batch(roles: Roles) -> None:
    prompt = roles.prompt_ids([{"role": "user", "content": "hello"}])
    sequences = [(prompt, roles.reply_ids("a b c d e f")), (prompt, roles.reply_ids("a"))]
    together = reward_model.read_features(roles, sequences)
    alone = torch.cat([reward_model.read_features(roles, [sequence]) for sequence in sequences])
    torch.testing.assert_close(together, alone, atol=2e-2, rtol=2e-2)
