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
from trainer.models import POLICY, REFERENCE, Origin, Roles, compute_dtype, use_cheap_passes
from trainer.passes.cast import cast

LEARNING_RATE_TIMES_WIDTH = 0.04
"""PPO's learning rate times hidden size: a tenth of what adapters take."""


def load_roles(origin: Origin, device: torch.device | None = None) -> Roles:
    """Of either kind of tuning. Raises ValueError where what would be trained could not be published."""
    if origin.tuning == "lora":
        return Roles.load(origin.base, origin.rank, origin.parent, origin.anchor, device)
    device = device or torch.get_default_device()
    dtype = compute_dtype(device)
    policy = _load_model(origin.base, origin.parent)
    with cast(policy, dtype):  # as which it will compute
        use_cheap_passes(policy)
    if policy.get_input_embeddings().weight is policy.get_output_embeddings().weight:
        policy.get_input_embeddings().requires_grad_(False)
    reference = _load_model(origin.base, origin.anchor).requires_grad_(False)
    _round(reference, dtype)
    use_cheap_passes(reference)
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
        base = _load_model(self.origin.base, None).requires_grad_(False)
        _round(base, self.reference.dtype)
        use_cheap_passes(base)
        return base.eval().to(self.device)


def _load_model(base: str | Path, policy: Path | None) -> PreTrainedModel:
    """A policy as a whole model, in float32: its own, or the base with its adapter merged into it. None: the base."""
    if policy is None or (policy / CONFIG).exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if policy is not None:
            model = PeftModel.from_pretrained(model, policy).merge_and_unload()
        return model.requires_grad_(True)  # PEFT has frozen it
    return AutoModelForCausalLM.from_pretrained(policy / MERGED, dtype=torch.float32)


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the weights in that type. Not `model.to`, which would round what rotary embeddings keep, too."""
    for weights in model.parameters():
        weights.data = weights.to(dtype)


def _check_files(base: Path, weights: dict[str, nn.Parameter]) -> None:
    """Raises ValueError where the base's files have no such weights, of which `publish.py` writes others."""
    names: set[str] = set()
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    for name in weights:
        if name not in names and name.partition(".")[2] not in names:
            raise ValueError(f"{base} has no {name} in safetensors: set RATCHET_TUNING=lora.")
