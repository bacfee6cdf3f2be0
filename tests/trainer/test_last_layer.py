"""The last layer at some tokens alone: the same log-probabilities, states and gradients where they are read, from fewer rows."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_model import FAMILIES, make_family
from trainer import models
from trainer.batches import Batch
from trainer.models import Roles
from trainer.passes import last_layer
from trainer.passes.shapes import PLACES

SEQUENCES = [([*range(5, 60)], [7, 8, 9, 1]), ([*range(40, 61)], [33, 1]), ([90] * 70, [12, 13, 14, 15, 1])]


def read(roles: Roles, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Log-probabilities, hidden states at the reply, gradients of the adapter."""
    roles.zero_grad()
    logprobs = roles.logprobs(batch)
    (logprobs * torch.arange(batch.ids.numel()).view(batch.ids.shape)).sum().backward()  # type: ignore[no-untyped-call]
    states = roles.read(batch).states[batch.reply_mask.bool()]
    return logprobs.detach(), states, [weights.grad for weights in roles.policy_parameters()]


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_the_whole_layer_gives(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    roles = Roles.load(make_family(tmp_path, family), rank=4)
    for weights in roles.policy_parameters():
        nn.init.normal_(weights, std=0.1)
    batch = roles.batch(SEQUENCES)
    found = read(roles, batch)
    monkeypatch.setattr(models, "last_layer_at", lambda *_: nullcontext())
    torch.testing.assert_close(found, read(roles, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_feed_forward_part_sees_the_reply_alone(family: str, tmp_path: Path) -> None:
    roles = Roles.load(make_family(tmp_path, family), rank=4)
    seen: list[tuple[str, int]] = []

    def note(name: str, inputs: tuple[Any, ...]) -> None:
        seen.append((name, inputs[0].shape[:-1].numel()))

    for name, module in roles.model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_hook(lambda _, inputs, __, name=name: note(name, inputs))
    batch = roles.batch(SEQUENCES)
    roles.read(batch)
    assert [number for _, number in sorted(seen)] == [batch.ids.numel(), PLACES]


def test_a_backbone_without_a_list_of_layers_is_computed_whole() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 3, 4)
    with last_layer.last_layer_at(backbone, torch.tensor([0]), torch.Size((2, 3))):
        assert torch.equal(backbone(x), backbone[0](x))


def test_what_experts_say_beside_their_output_is_kept() -> None:
    class Experts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return 2 * x, "router"

    backbone, layer = nn.Module(), nn.Module()
    layer.mlp = Experts()
    backbone.layers = nn.ModuleList([layer])
    x = torch.ones(2, 3, 4)
    with last_layer.last_layer_at(backbone, torch.tensor([1, 5]), x.shape[:2]):
        output, said = layer.mlp(x)
    assert said == "router"
    assert output[..., 0].tolist() == [[0, 2, 0], [0, 0, 2]]
