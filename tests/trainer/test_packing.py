"""Packed layers compute what the layers do, and leave no trace."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_model import FAMILIES, make_family
from tests.trainer.test_models import load_trained
from trainer.models import POLICY, REFERENCE, Roles
from trainer.passes import packing

IDS = torch.tensor([[5, 9, 40, 41, 12, 77, 60], [3, 70, 71, 80, 90, 4, 33]])


@torch.no_grad()
def logits(roles: Roles, role: str) -> Tensor:
    with roles.acting_as(role):
        found: Tensor = roles.model(input_ids=IDS).logits
    return found


def num_packed(roles: Roles) -> int:
    return sum("packing" in getattr(module.forward, "__module__", "") for module in roles.modules())


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_as_policy_and_as_reference_what_the_layers_do(family: str, tmp_path: Path) -> None:
    roles = load_trained(make_family(tmp_path, family))
    num_layers = 1 if family == "gpt2" else 15  # GPT-2's are of another kind, but for its head
    for role in (POLICY, REFERENCE):
        wanted = logits(roles, role)
        with roles.acting_as(role), packing.packed(roles.model):
            assert num_packed(roles) == num_layers
            torch.testing.assert_close(logits(roles, role), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(roles, POLICY), logits(roles, REFERENCE), atol=0.01)


@pytest.mark.usefixtures("_in_bfloat16")
def test_in_bfloat16_it_differs_by_rounding_alone(tmp_path: Path) -> None:
    roles = load_trained(make_family(tmp_path, "qwen2"))  # it has biases
    wanted = logits(roles, POLICY)
    with roles.acting_as(POLICY), packing.packed(roles.model):
        found = logits(roles, POLICY)
    assert (found - wanted).float().norm() <= 0.02 * wanted.float().norm()


def test_afterwards_layers_are_as_they_were(tmp_path: Path) -> None:
    roles = load_trained(make_family(tmp_path, "llama"))
    wanted = logits(roles, POLICY)
    with pytest.raises(ZeroDivisionError), roles.acting_as(POLICY), packing.packed(roles.model):
        _ = num_packed(roles) / 0
    assert not num_packed(roles)
    assert torch.equal(logits(roles, POLICY), wanted)


def test_weights_that_changed_since_are_packed_anew(tmp_path: Path) -> None:
    roles = load_trained(make_family(tmp_path, "llama"))
    before = logits(roles, POLICY)
    for _ in range(2):
        with roles.acting_as(POLICY), packing.packed(roles.model):
            found = logits(roles, POLICY)
        with torch.no_grad():
            for weights in roles.policy_parameters():
                weights.zero_()
    torch.testing.assert_close(found, logits(roles, REFERENCE), atol=0.05, rtol=0.05)
    assert not torch.allclose(found, before, atol=0.05)


def test_a_model_too_large_to_copy_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = load_trained(make_family(tmp_path, "llama"))
    monkeypatch.setattr(packing, "MOST_BYTES", 1000)
    with roles.acting_as(POLICY), packing.packed(roles.model):
        assert not num_packed(roles)
