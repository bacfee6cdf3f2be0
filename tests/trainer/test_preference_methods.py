"""DPO and ORPO on a tiny model: an easy rule is learnt, the anchor stays, the same seed gives the same bytes."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.tiny_model import make_model
from trainer import preference_methods
from trainer.batches import Batch
from trainer.features import read_features
from trainer.iterations import Iteration, NonFinite, Outcome, checkpoint_path
from trainer.models import Roles
from trainer.ppo import PPOSettings
from trainer.preference_methods import PreferenceRun, PreferenceSettings
from trainer.preferences import Pair, Source
from trainer.reward_model import Head
from trainer.trl_trainers import lend

SCORING = PPOSettings(rollouts=16, minibatch=8, max_tokens=6, kl_budget=1000.0)
SETTINGS = PreferenceSettings(iterations=3, epochs=8, batch=8, learning_rate_times_width=0.6)
METHODS = ("dpo", "orpo")
LIKED, DISLIKED = 40, 41


def pairs_of_a_rule(start: int, count: int) -> list[Pair]:
    """Replies that begin with one token are always chosen over those that begin with another; first and second alternate."""
    found = []
    for number in range(start, start + count):
        good, bad = [LIKED, 60 + number % 20, 1], [DISLIKED, 60 + number % 17, 62, 1]
        prompt = [3, 70 + number % 30, 100 + number, 4]
        first, second = (good, bad) if number % 2 else (bad, good)
        found.append(Pair(prompt, first, second, float(number % 2), Source(f"group {number}")))
    return found


PAIRS = pairs_of_a_rule(0, 24)
UNSEEN = pairs_of_a_rule(100, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def roles(base: Path) -> Roles:
    torch.manual_seed(0)
    return Roles.load(base, rank=4)


def start(roles: Roles, method: Literal["dpo", "orpo"], pairs: list[Pair] = PAIRS) -> PreferenceRun:
    num_features = read_features(roles, [([5], [40, 1])]).shape[1]
    head = Head(torch.ones(num_features), torch.ones(num_features, 2), torch.zeros(2), torch.ones(2))
    prompts = [pair.prompt for pair in PAIRS]
    settings = replace(SETTINGS, method=method)
    return PreferenceRun(roles, head, head, pairs, prompts, settings, SCORING, seed=0)


def train(run: PreferenceRun, folder: Path) -> Outcome:
    return preference_methods.train(run, folder / "checkpoints", lambda _: None)


def margin(roles: Roles) -> float:
    """Mean log-probability of the chosen over the rejected first token, on prompts that were not trained on."""
    chosen = Batch.collate([(pair.prompt, [LIKED]) for pair in UNSEEN], roles.pad_id, roles.device)
    rejected = Batch.collate([(pair.prompt, [DISLIKED]) for pair in UNSEEN], roles.pad_id, roles.device)
    with torch.no_grad():
        return (roles.logprobs(chosen) - roles.logprobs(rejected)).sum(1).mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_is_learnt_and_nothing_but_the_adapter_changes(
    method: Literal["dpo", "orpo"], roles: Roles, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = roles.model.get_base_model()
    frozen = {
        name: weights.clone() for name, weights in roles.model.named_parameters() if ".policy." not in name
    }
    forward, ends, pad = vars(model).get("forward"), roles.end_ids, roles.tokenizer.pad_token
    configs = [str(model.config), str(model.generation_config)]
    before = margin(roles)

    outcome = train(start(roles, method), tmp_path)

    assert margin(roles) > before + 1.0
    now = dict(roles.model.named_parameters())
    assert all(torch.equal(now[name], weights) for name, weights in frozen.items())
    assert vars(model).get("forward") is forward
    assert (roles.end_ids, roles.tokenizer.pad_token) == (ends, pad)
    assert [str(model.config), str(model.generation_config)] == configs
    assert not any(module.training for module in roles.modules())
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["000.pt", "001.pt", "002.pt"]
    assert [iteration.number for iteration in outcome.iterations] == [0, 1, 2]
    assert outcome.iterations[0].kl == 0.0
    assert outcome.iterations[2].kl > 0.0


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes(
    method: Literal["dpo", "orpo"], base: Path, tmp_path: Path
) -> None:
    files = []
    for number in range(2):
        torch.manual_seed(0)
        train(start(Roles.load(base, rank=4), method), tmp_path / str(number))
        torch.manual_seed(number)  # what others draw changes nothing
        files.append(checkpoint_path(tmp_path / str(number) / "checkpoints", 2).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_no_number_ends_the_run_before_it_reaches_the_weights(
    method: Literal["dpo", "orpo"], roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(roles, method)
    field = {"dpo": "beta", "orpo": "odds_weight"}[method]
    run = replace(run, settings=replace(run.settings, **{field: float("nan")}))
    before = roles.policy_state()
    with pytest.raises(NonFinite, match="loss became nan"):
        train(run, tmp_path)
    assert all(torch.equal(weights, before[name]) for name, weights in roles.policy_state().items())


@pytest.mark.parametrize("method", METHODS)
def test_ties_teach_nothing(method: Literal["dpo", "orpo"], base: Path, tmp_path: Path) -> None:
    states = []
    ties = [replace(pair, label=0.5) for pair in UNSEEN]
    for number, pairs in enumerate((PAIRS, PAIRS + ties)):
        torch.manual_seed(0)
        run = start(Roles.load(base, rank=4), method, pairs)
        train(run, tmp_path / str(number))
        states.append(run.roles.policy_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pairs", [[], PAIRS[:1], [replace(pair, label=0.5) for pair in PAIRS]])
def test_too_few_pairs_are_refused(
    method: Literal["dpo", "orpo"], pairs: list[Pair], roles: Roles, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"[01] pairs prefer one reply, and {method} needs 2"):
        train(start(roles, method, pairs), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_ends_where_the_kl_budget_is_spent(roles: Roles, tmp_path: Path) -> None:
    run = start(roles, "dpo")
    seen: list[Iteration] = []
    outcome = preference_methods.train(
        replace(run, scoring=replace(SCORING, kl_budget=1e-6)), tmp_path, seen.append
    )
    assert (len(outcome.iterations), outcome.why) == (2, "the KL budget was spent")
    assert seen == outcome.iterations


def test_the_reference_is_the_anchor_also_where_the_policy_has_left_it(roles: Roles) -> None:
    anchor = [roles.read(one(pair)).logprobs.sum().item() for pair in PAIRS]
    with torch.no_grad():
        for weights in roles.policy_parameters():
            weights.fill_(0.1)
    rows = preference_methods._dpo_rows(roles, PAIRS)
    assert rows["ref_chosen_logps"][:] == pytest.approx(anchor, rel=1e-4)
    assert rows["prompt_ids"][:] == [pair.prompt for pair in PAIRS]
    assert {chosen[0] for chosen in rows["chosen_ids"]} == {LIKED}
    assert {rejected[0] for rejected in rows["rejected_ids"]} == {DISLIKED}


def one(pair: Pair) -> Batch:
    """The chosen reply alone."""
    chosen = pair.first if pair.label == 1.0 else pair.second
    return Batch.collate([(pair.prompt, chosen)], 0, torch.device("cpu"))


def test_orpos_likelihood_is_that_of_the_replies_alone(roles: Roles) -> None:
    """TRL's own counts the prompt's tokens too."""
    chosen = Batch.collate([(pair.prompt, pair.first) for pair in PAIRS[1::2]], roles.pad_id, roles.device)
    with torch.no_grad():
        expected = -(roles.logprobs(chosen).sum() / chosen.reply_mask.sum()).item()
        with lend(roles) as lent:
            trainer = preference_methods._make_trainer(start(roles, "orpo"), lent, PAIRS[1::2], 1)
            batch = trainer.data_collator(list(trainer.train_dataset))
            likelihood = trainer.concatenated_forward(trainer.model, batch)[4].item()
    assert likelihood == pytest.approx(expected, rel=1e-4)
