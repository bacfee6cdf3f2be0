"""Our linear layer with an adapter against PEFT's: the same numbers, and gradients for the adapter alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from service.weights import CONFIG, check_adapter
from tests.tiny_model import make_family
from trainer.models import Roles
from trainer.passes.lora import OUTPUTS_ADAPTED, LowRankLinear, adapter_config, with_cheap_passes
from trainer.publish import save_adapter


class Tiny(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., 8) -> (..., 4)."""
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


def make(config: LoraConfig, dtype: torch.dtype) -> nn.Module:
    """The same weights at each call; an adapter that changes something."""
    torch.manual_seed(0)
    config.target_modules, config.task_type = {"first", "second"}, None
    model = get_peft_model(Tiny().to(dtype), config)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weights)
    return model


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Its output, and the gradient of the output's squares for each trained weight, by name."""
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is torch.bfloat16):
        output = model(x)
    output.float().square().sum().backward()
    found = {name: weights.grad for name, weights in model.named_parameters() if weights.grad is not None}
    return output.detach().float(), found


def peft_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8)


def our_config() -> LoraConfig:
    return with_cheap_passes(peft_config())


def test_outputs_and_gradients_are_those_of_peft() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    ours, theirs = make(our_config(), torch.float32), make(peft_config(), torch.float32)
    assert sum(isinstance(module, LowRankLinear) for module in ours.modules()) == 2
    (output, found), (expected, wanted) = gradients(ours, x), gradients(theirs, x)
    torch.testing.assert_close(output, expected)
    assert found.keys() == wanted.keys()
    assert all("lora" in name for name in found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_float32_as_peft_is() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact_model = make(peft_config(), torch.bfloat16).float()  # the same rounded weights
    exact, wanted = gradients(exact_model, x.float())
    errors = []
    for config in (our_config(), peft_config()):
        output, found = gradients(make(config, torch.bfloat16), x)
        worst = max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)
        errors.append((((output - exact).norm() / exact.norm()).item(), worst))
        assert all(gradient.dtype is torch.float32 for gradient in found.values())
    (ours, our_worst), (theirs, their_worst) = errors
    assert ours <= 1.5 * theirs < 0.02
    assert our_worst <= 1.5 * their_worst < 0.05


def test_the_input_has_a_gradient_where_it_needs_one() -> None:
    found = []
    for config in (our_config(), peft_config()):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        make(config, torch.float32)(x).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_what_is_not_one_plain_adapter_is_left_to_peft() -> None:
    model = make(our_config(), torch.float32)
    x = torch.randn(2, 8)
    adapted = model(x)
    with model.disable_adapter():  # type: ignore[operator]
        plain = model(x)
    assert (adapted - plain).abs().max() > 0.1
    model.merge_adapter()  # type: ignore[operator]
    torch.testing.assert_close(model(x), adapted)


def test_an_adapter_from_a_folder_computes_so_too(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    save_adapter(Roles.load(base, rank=4), tmp_path / "adapter")
    for parent in (None, tmp_path / "adapter"):
        modules = Roles.load(base, rank=8, parent=parent).model.modules()
        ranks = [module.r["policy"] for module in modules if isinstance(module, LowRankLinear)]
        assert ranks
        assert set(ranks) == {4 if parent else 8}


def test_other_kinds_of_layers_are_left_to_peft(tmp_path: Path) -> None:
    roles = Roles.load(make_family(tmp_path, "gpt2"), rank=4)
    assert not any(isinstance(module, LowRankLinear) for module in roles.model.modules())
    assert roles.policy_parameters()


@pytest.mark.parametrize(
    ("family", "tied", "adapted"),
    [("llama", False, True), ("llama", True, False), ("qwen3", False, True), ("mistral", False, False)],
)
def test_output_embeddings_are_adapted_where_they_are_the_models_own_and_engines_take_that(
    family: str, tied: bool, adapted: bool, tmp_path: Path
) -> None:
    base = make_family(tmp_path / "base", family, tied=tied)
    names = Roles.load(base, rank=4).policy_weights()
    assert any("lm_head" in name for name in names) == adapted
    assert sum("q_proj.lora_A" in name for name in names) == 2


@pytest.mark.parametrize(("share", "adapted"), [(1.0, [0, 1]), (0.6, [0, 1]), (0.5, [1]), (0.01, [1])])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_on_the_last_layers(
    share: float, adapted: list[int], tied: bool, tmp_path: Path
) -> None:
    base = make_family(tmp_path / "base", "llama", tied=tied)
    roles = Roles.load(base, rank=4, layers=share)
    names = roles.policy_weights()
    assert [number for number in range(2) if any(f".layers.{number}." in name for name in names)] == adapted
    for number in adapted:
        assert sum(f".layers.{number}." in name for name in names) == 2 * 7
    assert any("lm_head" in name for name in names) != tied
    save_adapter(roles, tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", base)
    targets = json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]
    assert targets == sorted(targets), "the same policy would have another file each time"
    again = Roles.load(base, rank=8, parent=tmp_path / "adapter")
    assert again.policy_weights().keys() == names.keys(), (
        "a policy that goes on from another keeps its layers"
    )


def test_a_share_of_layers_that_are_not_found_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_family(tmp_path / "base", "llama"))
    model.model.blocks = model.model.layers
    del model.model.layers
    adapter_config(model, rank=4)
    with pytest.raises(ValueError, match=r"last of LlamaForCausalLM.*RATCHET_LORA_LAYERS=1"):
        adapter_config(model, rank=4, share=0.5)


def test_a_folder_holds_no_more_of_output_embeddings_than_their_adapter(tmp_path: Path) -> None:
    """PEFT would put the base's beside it, which the service refuses."""
    base = make_family(tmp_path / "base", "llama", tied=False)
    save_adapter(Roles.load(base, rank=4), tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", base)


@pytest.mark.engine
def test_the_engine_takes_an_adapter_of_these_models_output_embeddings() -> None:
    names = sorted(OUTPUTS_ADAPTED | {"MistralForCausalLM"})
    asked = (  # in a process of its own, since vLLM changes the one that it is imported into
        "import sys; from vllm.model_executor.models.registry import ModelRegistry as known\n"
        "classes = {name: known.models[name].load_model_cls() for name in sys.argv[1:]}\n"
        "print(*[name for name, each in classes.items() if 'lm_head' in each.embedding_modules])"
    )
    told = subprocess.run([sys.executable, "-c", asked, *names], capture_output=True, text=True, check=True)
    assert set(told.stdout.split()) == OUTPUTS_ADAPTED
