"""A model cast for a while computes as one that was loaded so, and its own weights get the gradients."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny_model import FAMILIES, make_family
from trainer.passes.cast import cast

IDS = torch.tensor([[5, 9, 40, 41, 12, 77, 60], [3, 70, 71, 80, 90, 4, 33]])


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of what a cross entropy would be."""
    logits = model(input_ids=IDS).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return logits, {name: weights.grad for name, weights in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_as_if_it_had_been_loaded_so(family: str, tmp_path: Path) -> None:
    make_family(tmp_path, family)
    kept = load(tmp_path, torch.float32)
    with cast(kept, torch.bfloat16):
        logits = kept(input_ids=IDS).logits
    assert torch.equal(logits, load(tmp_path, torch.bfloat16)(input_ids=IDS).logits)


def test_gradients_are_the_cast_weights_in_the_kept_ones_type(tmp_path: Path) -> None:
    make_family(tmp_path, "qwen3")
    kept, loaded = load(tmp_path, torch.float32), load(tmp_path, torch.bfloat16)
    with cast(kept, torch.bfloat16):
        kept(input_ids=IDS).logits.float().log_softmax(-1)[..., 7].sum().backward()
    _, wanted = gradients(loaded)
    for name, weights in kept.named_parameters():
        assert weights.grad is not None
        assert weights.grad.dtype is torch.float32
        assert torch.equal(weights.grad, wanted[name].float()), name


def test_afterwards_all_is_as_it_was_whatever_happens(tmp_path: Path) -> None:
    make_family(tmp_path, "llama", tied=True)
    model = load(tmp_path, torch.float32)
    before, state = list(model.named_parameters()), deepcopy(model.state_dict())
    with cast(model, torch.bfloat16):
        embeddings = model.get_input_embeddings().weight
        assert embeddings.dtype is torch.bfloat16
        assert embeddings is model.get_output_embeddings().weight
    with pytest.raises(ZeroDivisionError), cast(model, torch.bfloat16):
        _ = 1 / 0
    after = list(model.named_parameters())
    assert [(name, id(weights)) for name, weights in after] == [(name, id(each)) for name, each in before]
    assert all(torch.equal(weights, state[name]) for name, weights in after)


def test_a_model_that_is_of_the_type_keeps_its_own_weights(tmp_path: Path) -> None:
    make_family(tmp_path, "llama")
    model = load(tmp_path, torch.float32)
    weights = model.model.layers[0].mlp.up_proj.weight
    with cast(model, torch.float32):
        assert model.model.layers[0].mlp.up_proj.weight is weights
