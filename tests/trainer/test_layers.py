"""The layers that no adapter changes: left out of the policy's passes, with the same log-probabilities and gradients."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.tiny_model import FAMILIES, make_family
from trainer.models import Roles
from trainer.passes.layers import find_frozen_layers, find_layers, recorded, skipped

SEQUENCES = [([*range(5, 60)], [7, 8, 9, 1]), ([*range(40, 61)], [33, 1]), ([90] * 70, [12, 13, 14, 15, 1])]


def load(folder: Path, family: str) -> Roles:
    torch.manual_seed(0)
    roles = Roles.load(make_family(folder, family), rank=4, layers=0.5)
    for weights in roles.policy_parameters():
        nn.init.normal_(weights, std=0.1)
    return roles


def train(roles: Roles, lower: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Log-probabilities, gradients of the adapter."""
    roles.zero_grad()
    batch = roles.batch(SEQUENCES)
    logprobs = roles.logprobs(batch, lower=lower)
    (logprobs * torch.arange(batch.ids.numel()).view(batch.ids.shape)).sum().backward()  # type: ignore[no-untyped-call]
    return logprobs.detach(), [weights.grad for weights in roles.policy_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_policy_goes_on_from_what_the_reference_read(family: str, tmp_path: Path) -> None:
    roles = load(tmp_path, family)
    lower = roles.read(roles.batch(SEQUENCES)).lower
    assert lower is not None
    found = train(roles, lower)
    torch.testing.assert_close(found, train(roles, None), atol=0, rtol=0)
    shifted, _ = train(roles, lower.roll(1, 0))
    assert (shifted - found[0]).abs().max() > 0.01, "it did not go on from there"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_skipped_is_not_computed(family: str, tmp_path: Path) -> None:
    roles = load(tmp_path, family)
    batch = roles.batch(SEQUENCES)
    lower = roles.read(batch).lower
    frozen, *adapted = find_layers(roles.language_model.base_model)
    calls: list[nn.Module] = []
    for layer in (frozen, *adapted):
        layer.mlp.register_forward_hook(lambda module, *_: calls.append(module))
    roles.logprobs(batch, lower=lower)
    assert calls == [layer.mlp for layer in adapted]
    calls.clear()
    roles.logprobs(batch)
    assert calls == [layer.mlp for layer in (frozen, *adapted)]


def test_an_adapter_on_all_layers_leaves_none_out(tmp_path: Path) -> None:
    """As those of earlier releases are."""
    model = AutoModelForCausalLM.from_pretrained(make_family(tmp_path / "base", "llama"))
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config, adapter_name="policy").save_pretrained(str(tmp_path / "parent"))
    parent = tmp_path / "parent" / "policy"
    for anchor in (None, parent):
        roles = Roles.load(tmp_path / "base", 4, parent, anchor)
        assert roles.read(roles.batch(SEQUENCES)).lower is None
    roles = Roles.load(tmp_path / "base", 4, None, anchor=parent)
    assert roles.read(roles.batch(SEQUENCES)).lower is None, (
        "of the anchor, whose lower layers are not the policy's"
    )


def test_a_model_whose_layers_read_more_of_each_other_is_computed_whole(tmp_path: Path) -> None:
    backbone = load(tmp_path, "llama").language_model.base_model
    assert len(find_frozen_layers(backbone)) == 1
    backbone.config.num_kv_shared_layers = 1
    assert not find_frozen_layers(backbone)


def test_layers_compute_again_afterwards() -> None:
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    with recorded([layer]) as outputs:
        expected = layer(x)
    with skipped([layer], torch.zeros(1, 2)):
        assert not layer(x).any()
    assert torch.equal(layer(x), expected)
    assert torch.equal(outputs[0], expected)
