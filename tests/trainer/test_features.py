"""What heads read of a reply, on a tiny model whose anchor was asked."""

import pytest
import torch

from tests.tiny_model import make_model
from trainer.consensus import Asked, Consensus
from trainer.features import (
    AGREEMENT,
    ask_consensus,
    num_features,
    read_features,
    reward_features,
    value_features,
)
from trainer.models import Roles
from trainer.rollouts import Sampler

SURPRISE = -3


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    return Roles.load(make_model(tmp_path_factory.mktemp("tiny")), rank=4)


@pytest.fixture(scope="module")
def prompts(roles: Roles) -> list[list[int]]:
    return [roles.prompt_ids([{"role": "user", "content": text}]) for text in ("colour?", "a lemon?")]


@pytest.fixture
def yes(roles: Roles, prompts: list[list[int]]) -> Consensus:
    """As if the anchor was sure of yes, and of another word for the other prompt."""
    one, other = map(tuple, prompts)
    return Consensus.of({one: Asked("?", ["yes", "Yes."]), other: Asked("?", ["sour"])})


def test_a_reply_that_says_the_same_agrees_and_what_others_are_told_does_not(
    roles: Roles, prompts: list[list[int]], yes: Consensus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "consensus", yes)
    replies = [roles.reply_ids(text) for text in ("Yes.", "no", "no, yes", "Sour? Yes.")]
    batch = roles.batch([(prompts[0], reply) for reply in replies])
    features = reward_features(roles.read(batch), batch.reply_mask)
    assert features.shape == (4, num_features(roles.hidden_size))
    assert features[:, AGREEMENT].tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])


def test_what_is_less_likely_than_expected_surprises(roles: Roles, prompts: list[list[int]]) -> None:
    surest = Sampler(roles.end_ids, max_tokens=6, temperature=0.3)
    likely = surest.sample(roles.model, [prompts[0]], torch.Generator().manual_seed(0))[0].reply_ids
    batch = roles.batch([(prompts[0], reply) for reply in (likely, roles.reply_ids("Yes."))])
    reading = roles.read(batch)
    with torch.no_grad():
        logprobs = roles.model(input_ids=batch.ids).logits.float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    expected = torch.zeros_like(entropy)
    expected[:, 1:] = (-reading.logprobs[:, 1:] - entropy[:, :-1]).clamp(min=0.0)
    torch.testing.assert_close(reading.surprise, expected * batch.reply_mask, rtol=2e-2, atol=2e-2)
    assert (reading.surprise > 0.0).any(1).tolist() == [False, True]
    features = reward_features(reading, batch.reply_mask)
    torch.testing.assert_close(features[:, SURPRISE], -reading.surprise.sum(1))


def test_before_its_end_token_the_value_sees_what_the_reward_sees_of_what_is_there(
    roles: Roles, prompts: list[list[int]], yes: Consensus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "consensus", yes)
    reply = roles.reply_ids("yes. sour. no")
    batch, before = roles.batch([(prompts[1], reply)]), roles.batch([(prompts[1], reply[:-1])])
    last = len(prompts[1]) + len(reply) - 1
    value = value_features(roles.read(batch), batch.reply_mask)[0, last]
    reward = reward_features(roles.read(before), before.reply_mask)[0]
    torch.testing.assert_close(value[: len(reward)], reward, rtol=1e-2, atol=1e-2)


def test_words_are_spread_evenly_over_their_dimensions(roles: Roles) -> None:
    """Their second moment over the vocabulary is the identity but for what keeps it from singular, whatever the embeddings'."""
    everything = [*range(roles.language_model.config.vocab_size)]
    words = roles.read(roles.batch([([5], everything)])).words[0, 1 : 1 + len(everything)]
    moment = words.T @ words / len(words)
    torch.testing.assert_close(moment, torch.eye(roles.hidden_size), atol=0.1, rtol=0.0)


def test_features_do_not_depend_on_the_batch(roles: Roles) -> None:
    prompt = roles.prompt_ids([{"role": "user", "content": "hello"}])
    sequences = [(prompt, roles.reply_ids("a b c d e f")), (prompt, roles.reply_ids("a"))]
    together = read_features(roles, sequences)
    alone = torch.cat([read_features(roles, [sequence]) for sequence in sequences])
    torch.testing.assert_close(together, alone, atol=2e-2, rtol=2e-2)


def test_the_anchor_is_asked_each_prompt_once_and_says_the_same_for_the_same_seed(
    roles: Roles, prompts: list[list[int]]
) -> None:
    sampler = Sampler(roles.end_ids, max_tokens=6)
    one = ask_consensus(roles, sampler, [*prompts, *prompts], seed=3)
    assert set(one.known) == set(map(tuple, prompts))
    assert any(one.foreign.values())
    assert ask_consensus(roles, sampler, prompts, seed=3) == one
    assert ask_consensus(roles, sampler, prompts, seed=4) != one


def test_the_policy_has_no_say_in_the_consensus(roles: Roles, prompts: list[list[int]]) -> None:
    sampler = Sampler(roles.end_ids, max_tokens=6)
    before = ask_consensus(roles, sampler, prompts, seed=3)
    kept = roles.policy_state()
    with torch.no_grad():
        for weights in roles.policy_parameters():
            weights.add_(0.5)
    after = ask_consensus(roles, sampler, prompts, seed=3)
    roles.load_policy_state(kept)
    assert after == before


@pytest.mark.parametrize("text", ["is a lemon", "caf\u00e9 na\u00efve.", "\u7b54\u6848 \u2014 \U0001f34b!"])
def test_pieces_make_the_text_with_whole_characters(roles: Roles, text: str) -> None:
    ids = roles.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = roles.pieces([*ids, roles.end_ids[0]])
    assert "".join(pieces).strip() == text
    assert (len(pieces), pieces[-1]) == (len(ids) + 1, "")


def test_with_very_many_prompts_each_is_asked_less_often(
    roles: Roles, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.features.MOST_ASKED", 4)
    asked = dict[tuple[int, ...], Asked]()
    monkeypatch.setattr(Consensus, "of", asked.update)
    ask_consensus(roles, Sampler(roles.end_ids, max_tokens=6), prompts, seed=3)
    assert [len(each.answers) for each in asked.values()] == [2, 2]
