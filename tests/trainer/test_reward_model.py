"""The loss against its table, intervals against known values, and that heads learn what votes say."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_model import make_model
from trainer import reward_model, reward_quality
from trainer.consensus import Asked, Consensus
from trainer.features import read_features
from trainer.models import Roles
from trainer.preferences import Dislike, Pair, Preferences, Source
from trainer.reward_model import RewardSettings


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


def test_pairs_count_by_their_weight() -> None:
    margin, label = torch.tensor([0.0, -1.0]), torch.ones(2)
    weighed = reward_model.pair_loss(margin, label, torch.tensor([3.0, 1.0])).item()
    assert weighed == pytest.approx((3 * 0.6931 + 1.3133) / 4, abs=1e-4)


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    folder: Path = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    return Roles.load(folder, rank=4)


@pytest.fixture(scope="module")
def prompts(roles: Roles) -> list[list[int]]:
    return [roles.prompt_ids([{"role": "user", "content": f"question {n}"}]) for n in range(24)]


@pytest.fixture(scope="module")
def own(roles: Roles, prompts: list[list[int]]) -> Tensor:
    """Features of what stands for the anchor's usual replies."""
    texts = ["yes yes", "no", "yes no no no"]
    sequences = [(prompt, roles.reply_ids(texts[n % 3])) for n, prompt in enumerate(prompts)]
    return read_features(roles, sequences)


def yes_over_no(roles: Roles, prompts: list[list[int]]) -> Preferences:
    yes, no = roles.reply_ids("yes yes"), roles.reply_ids("no")
    pairs = [
        Pair(prompt, *((yes, no, 1.0) if n % 2 else (no, yes, 0.0)), Source(str(n)))
        for n, prompt in enumerate(prompts)
    ]
    return Preferences(pairs, [])


def test_heads_learn_what_votes_say_and_are_the_same_every_time(
    roles: Roles, prompts: list[list[int]], own: Tensor
) -> None:
    train, held_out = yes_over_no(roles, prompts[:16]), yes_over_no(roles, prompts[16:])
    head = reward_model.fit(roles, train, own, RewardSettings(), members=4, seed=1)
    quality = reward_quality.measure(roles, head, held_out.pairs)
    assert quality.accuracy.share == 1.0
    assert quality.log_loss < 0.2
    assert quality.by_cohort["vote"].num_pairs == 8
    again = reward_model.fit(roles, train, own, RewardSettings(), members=4, seed=1)
    assert torch.equal(head.weight, again.weight)
    scores = head(own)
    torch.testing.assert_close(scores.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.std(0), torch.ones(4))


def test_a_reply_that_was_called_bad_scores_low(roles: Roles, prompts: list[list[int]], own: Tensor) -> None:
    preferences = yes_over_no(roles, prompts[:4])
    bad = roles.reply_ids("yes no no no")
    dislikes = [Dislike(prompt, bad, Source(f"bad {n}")) for n, prompt in enumerate(prompts)]
    both = Preferences(preferences.pairs, dislikes)
    head = reward_model.fit(roles, both, own, RewardSettings(), members=1, seed=1)
    features = read_features(roles, [(prompt, bad) for prompt in prompts])
    assert head(features).mean() < head(own).mean() - 0.3


def test_what_the_score_owes_to_length_can_be_taken_out(
    roles: Roles, prompts: list[list[int]], own: Tensor
) -> None:
    preferences = yes_over_no(roles, prompts)
    for kept in (True, False):
        settings = RewardSettings(length_bias=kept)
        head = reward_model.fit(roles, preferences, own, settings, members=2, seed=1)
        scores, length = head(own).mean(1), own[:, -1]
        correlation = torch.corrcoef(torch.stack([scores, length]))[0, 1].item()
        assert (abs(correlation) > 0.1) == kept


def test_ties_do_not_make_it_less_sure_of_what_was_decided() -> None:
    generator = torch.Generator().manual_seed(0)
    count, strength = 600, 1.5
    margins = torch.zeros(2 * count, 7)  # the last six are the plain ones
    margins[:, 0] = 2 * torch.randn(2 * count, generator=generator)
    decided = torch.rand(count, generator=generator) < torch.sigmoid(strength * margins[:count, 0])
    label = torch.cat([decided.float(), torch.full((count,), 0.5)])
    weight, groups = torch.ones(2 * count), list(map(str, range(2 * count)))
    ridge, sharpness = reward_model._cross_validate(margins, label, weight, groups, seed=0)
    slope = reward_model._fit_weights(margins, label, weight, ridge)[0].item()
    assert sharpness * slope == pytest.approx(strength, rel=0.2)


def test_what_all_voted_replies_say_alike_does_not_drown_what_votes_say(
    roles: Roles, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor is sure of `maybe`, which its own replies say and none that was voted on."""
    sure = Consensus.of({tuple(prompt): Asked("?", ["maybe"]) for prompt in prompts})
    monkeypatch.setattr(roles, "consensus", sure)
    texts = ["maybe", "yes yes", "maybe no"]
    own = read_features(roles, [(prompt, roles.reply_ids(texts[n % 3])) for n, prompt in enumerate(prompts)])
    train, held_out = yes_over_no(roles, prompts[:16]), yes_over_no(roles, prompts[16:])
    head = reward_model.fit(roles, train, own, RewardSettings(), members=2, seed=1)
    yes, no = (
        read_features(roles, [(pair.prompt, roles.reply_ids(text)) for pair in held_out.pairs])
        for text in ("yes yes", "no")
    )
    assert (head(yes) - head(no)).mean().item() > 1.0
