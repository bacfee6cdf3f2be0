"""A linear layer with an adapter, as one step of autograd: PEFT's layer, computed with fewer copies.

PEFT's own forward reads the input in float32 for the adapter's sake, and keeps each step on the way for backward. Here everything is
computed in the base's type, and what is kept is the input, which layers that read the same one share, and its few adapter channels.

Legend: N tokens, I and O channels in and out, R rank.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.passes.layers import count_adapted, find_layers

OUTPUTS_ADAPTED = frozenset(
    {
        "ApertusForCausalLM",
        "Exaone4ForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "NemotronForCausalLM",
        "Phi3ForCausalLM",
        "Qwen3ForCausalLM",
    }
)
"""Models for which vLLM 0.32 takes an adapter of the output embeddings; for others, as Mistral's and Qwen2's, it refuses one."""


def adapter_config(
    model: PreTrainedModel, rank: int, parent: Path | None = None, share: float = 1.0
) -> LoraConfig:
    """Of a new adapter on the linear layers of a model, or of the one in a folder; they compute as here.

    share: of the model's layers, the last ones, that a new adapter is on. Raises ValueError for less than all where none are found.
    """
    if parent is not None:
        return with_cheap_passes(LoraConfig.from_pretrained(str(parent)))
    return with_cheap_passes(
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules=_adapted(model, share),
            task_type="CAUSAL_LM",
        )
    )


def with_cheap_passes(config: LoraConfig) -> LoraConfig:
    """The same one, whose layers compute as here."""
    config._register_custom_module({nn.Linear: LowRankLinear})
    return config


def _adapted(model: PreTrainedModel, share: float) -> list[str]:
    """Names of linear layers; the output embeddings among them where engines take that, and the model has some of its own.

    Where two words' rows are alike no hidden state can say one without the other, and only another row can.
    """
    layers = find_layers(model.base_model)
    if share < 1.0 and not layers:
        raise ValueError(
            f"Which layers are the last of {type(model).__name__} is not known: set RATCHET_LORA_LAYERS=1"
        )
    unadapted = layers[: len(layers) - count_adapted(len(layers), share)]
    left_out = {module for layer in unadapted for module in layer.modules()}
    if type(model).__name__ not in OUTPUTS_ADAPTED or has_tied_embeddings(model):
        left_out.add(model.get_output_embeddings())
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    return [name for name, module in linear.items() if module not in left_out]


def has_tied_embeddings(model: Any) -> bool:
    """Whether a language model's output embeddings are its input embeddings."""
    tied: bool = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return tied


class LowRankLinear(lora.Linear):  # type: ignore[misc]
    """PEFT's layer; whatever is not one plain adapter on a plain linear layer is left to it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., I) -> (..., O)."""
        name, base = self._plain_adapter(), self.get_base_layer()
        if name is None or args or kwargs:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        flat = x.to(base.weight.dtype).flatten(0, -2)
        output = _LowRank.apply(flat, base.weight, base.bias, down, up, self.scaling[name])  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], -1)

    def merged_weight(self) -> Tensor | None:
        """(O, I) the base's weights with what the adapter adds to them; None where more than that is computed."""
        base = self.get_base_layer()
        if type(base) is not nn.Linear or self.merged:
            return None
        if self.disable_adapters:
            return base.weight
        name = self._plain_adapter()
        if name is None:
            return None
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return torch.addmm(base.weight.float(), up, down, alpha=self.scaling[name]).to(base.weight.dtype)

    def _plain_adapter(self) -> str | None:
        """The one that is active, where it alone changes what the base says."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if (
            self.disable_adapters
            or self.merged
            or len(names) != 1
            or type(self.get_base_layer()) is not nn.Linear
        ):
            return None
        [name] = names
        plain = name not in self.lora_variant and isinstance(self.lora_dropout[name], nn.Identity)
        return name if plain else None


class _LowRank(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T, with gradients for x, A and B: W is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        """x: (N, I), weight: (O, I), bias: (O,), down: (R, I), up: (O, R); returns (N, O) in the type of `weight`."""
        down, up = down.to(weight.dtype), up.to(weight.dtype)
        channels = x @ down.T  # (N, R)
        ctx.save_for_backward(x, channels, weight, down, up)
        ctx.scaling = scaling
        return functional.linear(x, weight, bias).addmm_(channels, up.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad: (N, O)."""
        x, channels, weight, down, up = ctx.saved_tensors
        grad_channels = (grad @ up).mul_(ctx.scaling)
        grad_x = (grad @ weight).addmm_(grad_channels, down) if ctx.needs_input_grad[0] else None
        # In this order: the other one, which need not be turned over afterwards, takes a quarter longer.
        grad_down, grad_up = (x.T @ grad_channels).T, (grad.T @ channels).mul_(ctx.scaling)
        return grad_x, None, None, grad_down.float(), grad_up.float(), None
