"""Policies that are whole models: every weight is trained as the model itself would have it, and the reference stays what it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from service.settings import Tuning
from tests.tiny_model import FAMILIES, make_family, read_logprobs
from tests.trainer import tiny_ppo
from tests.trainer.test_last_layer import SEQUENCES
from tests.trainer.test_models import load_trained as load_trained_adapter
from trainer import ppo_run
from trainer.batches import Batch
from trainer.iterations import checkpoint_path, load_average
from trainer.models import BASE_MODEL, POLICY, REFERENCE, Origin, Roles
from trainer.passes import packing
from trainer.publish import save_adapter, save_merged
from trainer.rollouts import Sampler
from trainer.whole import WholeRoles, load_roles

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
TIED_OR_NOT = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
exact = pytest.mark.usefixtures("_exact")
in_bfloat16 = pytest.mark.usefixtures("_in_bfloat16")


def load(base: Path, parent: Path | None = None, anchor: Path | None = None) -> WholeRoles:
    roles = load_roles(Origin(base, 4, parent, anchor, "full"))
    assert isinstance(roles, WholeRoles)
    return roles


@torch.no_grad()
def change(roles: WholeRoles) -> WholeRoles:
    """A policy that is not the anchor."""
    generator = torch.Generator().manual_seed(1)
    for weights in roles.policy_parameters():
        weights.add_(0.1 * torch.randn(weights.shape, generator=generator))
    return roles


def batch_of(roles: Roles) -> Batch:
    return roles.batch(SEQUENCES)


def weigh(logprobs: Tensor) -> Tensor:
    """A loss in which each token counts differently."""
    return (logprobs * torch.arange(1.0, logprobs.numel() + 1).view(logprobs.shape)).sum()


def plain_gradients(base: Path, roles: Roles) -> dict[str, Tensor]:
    """The same loss by transformers' model alone, in float32, with attention written out, a sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    batch = batch_of(roles)
    logprobs = torch.zeros(batch.ids.shape)
    for row, (prompt, reply) in enumerate(SEQUENCES):
        logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        places = slice(len(prompt), len(prompt) + len(reply))
        logprobs[row, places] = logits.log_softmax(-1).gather(-1, torch.tensor(reply)[:, None])[:, 0]
    weigh(logprobs).backward()  # type: ignore[no-untyped-call]
    return {name: weights.grad for name, weights in model.named_parameters() if weights.grad is not None}


@exact
@EVERY_FAMILY
@TIED_OR_NOT
def test_every_weight_gets_the_gradient_that_the_plain_model_has(
    family: str, tied: bool, tmp_path: Path
) -> None:
    roles = load(make_family(tmp_path, family, tied=tied))
    weigh(roles.logprobs(batch_of(roles))).backward()  # type: ignore[no-untyped-call]
    wanted = plain_gradients(tmp_path, roles)
    if tied:
        embeddings = roles.model.get_input_embeddings().weight
        [name] = [name for name, weights in roles.model.named_parameters() if weights is embeddings]
        assert embeddings.grad is None
        del wanted[name]
    weights = roles.policy_weights()
    assert weights.keys() == wanted.keys()
    for name, gradient in wanted.items():
        found = weights[name].grad
        assert found is not None
        assert (found - gradient).norm() <= 1e-4 * gradient.norm() + 1e-4, name


@in_bfloat16
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_in_bfloat16_gradients_differ_by_rounding_alone(family: str, tmp_path: Path) -> None:
    roles = load(make_family(tmp_path, family, tied=False))
    weigh(roles.logprobs(batch_of(roles))).backward()  # type: ignore[no-untyped-call]
    wanted = plain_gradients(tmp_path, roles)
    weights = roles.policy_weights()
    found = {name: gradient for name in wanted if (gradient := weights[name].grad) is not None}
    assert all(gradient.dtype is torch.float32 for gradient in found.values())
    together, plain = (torch.cat([each[name].flatten() for name in wanted]) for each in (found, wanted))
    assert torch.cosine_similarity(together, plain, dim=0) > 0.99


@in_bfloat16
@EVERY_FAMILY
def test_until_it_is_changed_the_policy_is_its_anchor_to_the_last_bit(family: str, tmp_path: Path) -> None:
    roles = load(make_family(tmp_path, family))
    assert torch.equal(roles.logprobs(batch_of(roles)), roles.read(batch_of(roles)).logprobs)


@exact
def test_training_leaves_the_reference_as_it_is(tmp_path: Path) -> None:
    roles = load(make_family(tmp_path, "llama"))
    before = roles.read(batch_of(roles))
    optimizer = torch.optim.SGD(roles.policy_parameters(), lr=1e-3)
    weigh(roles.logprobs(batch_of(roles))).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert (roles.logprobs(batch_of(roles)) - before.logprobs).abs().max() > 0.05
    after = roles.read(batch_of(roles))
    for one, other in ((before.words, after.words), (before.states, after.states)):
        assert torch.equal(one, other)
    assert torch.equal(before.logprobs, after.logprobs)
    assert all(weights.grad is None for weights in roles.reference.parameters())


@in_bfloat16
@EVERY_FAMILY
@torch.no_grad()
def test_the_samplers_logprobs_are_the_trainers(family: str, tmp_path: Path) -> None:
    roles = change(load(make_family(tmp_path, family)))
    prompts = [prompt for prompt, _ in SEQUENCES]
    for role in (POLICY, REFERENCE):
        with roles.acting_as(role):
            rollouts = Sampler(tuple(range(0, 280, 8)), max_tokens=12).sample(
                roles.model, prompts * 8, torch.Generator().manual_seed(0)
            )
        batch = roles.batch([(each.prompt_ids, each.reply_ids) for each in rollouts])
        sampled = torch.tensor([logprob for each in rollouts for logprob in each.logprobs])
        read = roles.logprobs(batch, role=role)[batch.reply_mask.bool()]
        assert (read - sampled).abs().mean() < 0.02  # rounding in bfloat16


@in_bfloat16
@torch.no_grad()
def test_sampling_packs_the_weights_that_the_policy_has_now(tmp_path: Path) -> None:
    roles = load(make_family(tmp_path, "llama"))
    ids = torch.tensor([[5, 9, 40, 41, 12]])
    for _ in range(2):
        with roles.acting_as(POLICY):
            wanted = roles.model(input_ids=ids).logits
            with packing.packed(roles.model):
                is_packed = any(
                    "packing" in getattr(module.forward, "__module__", "") for module in roles.modules()
                )
                # Where the CPU has no such products in bfloat16, the layers are left as they are.
                assert is_packed == torch.ops.mkldnn._is_mkldnn_bf16_supported()
                found = roles.model(input_ids=ids).logits
        assert (found - wanted).float().norm() <= 0.02 * wanted.float().norm()
        change(roles)


def test_what_is_asked_as_another_role_leaves_the_policy_in_its_place(tmp_path: Path) -> None:
    roles = load(make_family(tmp_path, "llama"))
    policy = roles.model
    with pytest.raises(ZeroDivisionError), roles.acting_as(REFERENCE):
        _ = 1 / (roles.model is policy)
    assert roles.model is policy
    assert all(weights.dtype is torch.float32 for weights in roles.policy_parameters())


@exact
@torch.no_grad()
def test_a_whole_model_can_be_parent_and_anchor_and_the_base_is_still_known(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    made = change(load(base))
    save_merged(made, tmp_path / "policy" / "merged")
    roles = load(base, tmp_path / "policy", tmp_path / "policy")
    batch = batch_of(roles)
    assert torch.equal(roles.logprobs(batch), made.logprobs(batch))
    assert torch.equal(roles.read(batch).logprobs, made.logprobs(batch))
    assert torch.equal(change(roles).logprobs(batch, role=BASE_MODEL), made.read(batch).logprobs)
    assert roles.end_ids == made.end_ids


@exact
@EVERY_FAMILY
@torch.no_grad()
def test_it_can_begin_as_a_policy_that_is_an_adapter(family: str, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", family)
    adapted = load_trained_adapter(base)
    save_adapter(adapted, tmp_path / "policy")
    roles = load(base, tmp_path / "policy")
    assert roles.policy_weights().keys() == load(base).policy_weights().keys()
    assert (roles.logprobs(batch_of(roles)) - adapted.logprobs(batch_of(roles))).abs().max() < 1e-3
    assert torch.equal(roles.read(batch_of(roles)).logprobs, adapted.read(batch_of(roles)).logprobs)


@exact
@torch.no_grad()
def test_what_is_saved_is_the_policy_with_tied_embeddings_the_bases(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "gemma3", tied=True)
    roles = change(load(base))
    save_merged(roles, tmp_path / "merged")
    saved, before = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for folder in (tmp_path / "merged", base)
    )
    embeddings = saved.get_input_embeddings().weight
    assert torch.equal(embeddings, before.get_input_embeddings().weight)
    [prompt, reply] = SEQUENCES[0]
    own = read_logprobs(saved, prompt + reply)[len(prompt) :]
    found = roles.logprobs(roles.batch([(prompt, reply)]))[0, len(prompt) : len(prompt) + len(reply)]
    assert found.tolist() == pytest.approx(own, abs=1e-4)


@exact
@torch.no_grad()
def test_a_probe_is_of_the_weights_as_they_were_rounded(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    roles = change(load(base))
    before = roles.logprobs(batch_of(roles))
    save_merged(roles, tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    [prompt, reply] = SEQUENCES[0]
    own = torch.tensor(read_logprobs(saved, prompt + reply)[len(prompt) :])
    places = slice(len(prompt), len(prompt) + len(reply))
    assert (roles.logprobs(batch_of(roles))[0, places] - own).abs().max() < 1e-4
    assert (before[0, places] - own).abs().max() > 1e-3


def test_a_base_that_a_policy_could_not_be_written_as_is_refused_at_once(tmp_path: Path) -> None:
    base = make_family(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\..* in safetensors: set RATCHET_TUNING=lora"):
        load(base)


@pytest.mark.parametrize(("tuning", "left"), [("lora", [0, 1, 2, 3, 4]), ("full", [0, 3, 4])])
def test_checkpoints_of_whole_models_that_are_needed_no_more_go_as_training_goes_on(
    tuning: Tuning, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.ppo_run.choose_kept", lambda iterations: len(iterations) - 1)
    base = make_family(tmp_path / "base", "llama")
    settings = replace(tiny_ppo.SETTINGS, iterations=5, rollouts=8, minibatch=8)
    checkpoints = tmp_path / "checkpoints"
    run = tiny_ppo.start(load_roles(Origin(base, 4, tuning=tuning)), settings)
    outcome = ppo_run.train(run, checkpoints, lambda _: None)
    assert sorted(checkpoints.glob("0*.pt")) == [checkpoint_path(checkpoints, number) for number in left]
    assert load_average(checkpoints, outcome.kept).keys() == run.roles.policy_weights().keys()


def test_a_weight_that_is_no_number_is_seen(tmp_path: Path) -> None:
    roles = load(make_family(tmp_path, "llama"))
    assert roles.is_finite()
    nn.init.constant_(roles.policy_parameters()[3], float("nan"))
    assert not roles.is_finite()
