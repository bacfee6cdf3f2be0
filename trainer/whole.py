"""Full fine-tuning: the policy is a whole model, whose every weight is trained, and the reference another one, frozen.

Weights are kept in float32, so that small steps are not rounded away, and cast for each pass to the type that is computed in. The
policy so computes as reference and engine do: until it is changed, its KL is 0.0. Tied embeddings stay the base's: an engine that is
given new ones goes on with its old output embeddings, without a word (vLLM's `reload_weights`). Untied ones are trained, as all else.

PPO takes 20 bytes a weight with bfloat16 (policy, gradient and AdamW's two moments 4 each, what is cast and the reference 2 each).
Such a policy is served by merged delivery alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from service.policies import MERGED
from service.weights import CONFIG
from trainer import models
from trainer.models import POLICY, REFERENCE, Origin, Roles, use_cheap_passes
from trainer.passes.cast import cast
from trainer.passes.lora import has_tied_embeddings
from trainer.publish import names_in_files

LEARNING_RATE_TIMES_WIDTH = 0.04
"""PPO's learning rate times hidden size, a tenth of what adapters take: 2e-4 at 192, 1e-5 at 4096."""


def load_roles(origin: Origin, device: torch.device | None = None) -> Roles:
    """Of either kind of tuning. Raises ValueError where what would be trained could not be published."""
    if origin.tuning == "lora":
        return Roles.load(origin.base, origin.rank, origin.parent, origin.anchor, device, origin.layers)
    device = device or torch.get_default_device()
    dtype = models.compute_dtype(device)
    policy = _load_trained(origin.base, origin.parent, dtype)
    reference = _load_frozen(origin.base, origin.anchor, dtype)
    roles = WholeRoles(policy, reference, AutoTokenizer.from_pretrained(origin.base), origin)
    _check_files(Path(origin.base), roles.policy_weights())
    return roles.eval().to(device)


class WholeRoles(Roles):
    """Two models: the policy's weights are kept in float32, the reference's in the type that both are computed in."""

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        origin: Origin,
    ) -> None:
        super().__init__(policy, tokenizer, origin)
        self.policy = policy
        self.reference = reference
        self._weights = {
            name: weights for name, weights in policy.named_parameters() if weights.requires_grad
        }

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model

    def policy_weights(self) -> dict[str, nn.Parameter]:
        """All that training changes, by name: the model, but for tied embeddings."""
        return self._weights

    def _model_of(self, role: str) -> PreTrainedModel:
        if role == POLICY:
            return self.policy
        return self.reference if role == REFERENCE else self._base

    @contextmanager
    def _switched_to(self, role: str) -> Iterator[None]:
        before, self.model = self.model, self._model_of(role)
        try:
            with cast(self.model, self.reference.dtype):
                yield
        finally:
            self.model = before

    @cached_property
    def _base(self) -> PreTrainedModel:
        """Only probes ask it, at a cycle's end; where it is not the reference it is loaded then."""
        if self.origin.anchor is None:
            return self.reference
        return _load_frozen(self.origin.base, None, self.reference.dtype).eval().to(self.device)


def _load_trained(base: str | Path, policy: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """All of its weights are to be trained, but for tied embeddings. dtype: that it will be cast to."""
    model = _load_model(base, policy).requires_grad_(True)  # PEFT freezes what it merges
    if has_tied_embeddings(model):
        model.get_input_embeddings().requires_grad_(False)
    # Which norms can be replaced is tried to the last bit, so in the type of the passes: else they might not be the reference's.
    with cast(model, dtype):
        use_cheap_passes(model)
    return model


@torch.no_grad()
def _load_frozen(base: str | Path, policy: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """Kept in that type. (`model.to` would round what rotary embeddings keep, too.)"""
    model = _load_model(base, policy).requires_grad_(False)
    for weights in model.parameters():
        weights.data = weights.to(dtype)
    use_cheap_passes(model)
    return model


def _load_model(base: str | Path, policy: Path | None) -> PreTrainedModel:
    """A policy as a whole model, in float32: its own, or the base with its adapter merged into it. None: the base."""
    adapted = policy is not None and (policy / CONFIG).exists()
    folder = base if policy is None or adapted else policy / MERGED
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, policy).merge_and_unload() if adapted else model


def _check_files(base: Path, weights: dict[str, nn.Parameter]) -> None:
    """Raises ValueError where the base's files have no such weights, of which `publish.py` writes others."""
    names: set[str] = set()
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    for name in weights:
        if names.isdisjoint(names_in_files(name)):
            raise ValueError(f"{base} has no {name} in safetensors: set RATCHET_TUNING=lora.")
