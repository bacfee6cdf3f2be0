"""TRL's trainers for what this project has: token ids in, the policy's adapter trained where it is, nothing left behind.

As they come, TRL's trainers take text, bring their own adapter (DPO looks for one that is called `default`), patch `forward` and
the configs of the model, print, save, and report to TRL's makers. Here the model is lent to them for a while (`lend`), as
a plain causal LM whose only trainable weights are the policy's, and comes back as it was but for those.

The overrides are of TRL 1.16.0, which pyproject.toml pins. Called by `preference_methods.py` and `sft.py`.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import datasets.utils as datasets_utils
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trainer.iterations import NonFinite
from trainer.models import Roles, compute_dtype

with warnings.catch_warnings():  # that it may change: the version is pinned, and tests run it
    warnings.simplefilter("ignore")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

__all__ = [
    "DPO",
    "ORPO",
    "SFT",
    "DPOConfig",
    "Lent",
    "ORPOConfig",
    "SFTConfig",
    "Schedule",
    "keep_checkpoint",
    "lend",
]

NEARLY_CERTAIN = -1e-6
"""Mean log-probability per token at which ORPO's odds end: at 0.0 they are infinite, and their gradient is no number."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast a trainer goes."""

    num_steps: int
    batch_size: int
    learning_rate: float
    """At its highest; it rises over the first tenth of the steps and falls to 0 at the last."""
    seed: int


@dataclass(frozen=True, slots=True)
class Lent:
    """What a trainer gets to work with."""

    model: PreTrainedModel
    """The base with the policy's adapter inside, not wrapped by PEFT."""
    tokenizer: PreTrainedTokenizerBase
    """A copy, since trainers set its pad token."""
    device: torch.device
    folder: str
    """Of files that nobody needs; gone afterwards."""

    def arguments(self, kind: type[Any], schedule: Schedule, **own: Any) -> TrainingArguments:
        """Settings of a TRL trainer that prints, saves and reports nothing. own: what only this trainer has."""
        arguments = kind(
            output_dir=self.folder,
            max_steps=schedule.num_steps,
            per_device_train_batch_size=schedule.batch_size,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, schedule.num_steps // 10),
            weight_decay=0.0,
            max_grad_norm=1.0,
            adam_beta2=0.95,
            seed=schedule.seed,
            data_seed=schedule.seed,
            use_cpu=self.device.type == "cpu",
            bf16=compute_dtype(self.device) is torch.bfloat16,  # TRL's default is bfloat16 everywhere
            gradient_checkpointing=False,  # TRL's default is on, and sampling under it gives nonsense
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            **own,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several would mean DataParallel, which TRL refuses
        return arguments


@contextmanager
def lend(roles: Roles) -> Iterator[Lent]:
    """The policy's model for a trainer. Afterwards all but the adapter's weights is as before, and in evaluation mode."""
    model = roles.model.get_base_model()
    tokenizer = copy.deepcopy(roles.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(roles.pad_id)
    changed = (model, model.config, model.config.get_text_config(), model.generation_config)
    before = [(thing, dict(vars(thing))) for thing in changed]
    try:
        with _quiet(), TemporaryDirectory() as folder:
            yield Lent(model, tokenizer, roles.device, folder)
    finally:
        for thing, attributes in before:
            vars(thing).clear()
            vars(thing).update(attributes)
        roles.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings by transformers (that it sets token ids, which `lend` takes back) and no bars by datasets."""
    level = transformers_logging.get_verbosity()
    had_bars = not datasets_utils.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    datasets_utils.disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            datasets_utils.enable_progress_bars()


def keep_checkpoint(roles: Roles, path: Path) -> None:
    """Writes the adapter's weights; raises NonFinite where one is no number, which attention on a CPU can hide from the loss."""
    state = roles.policy_state()
    if not all(bool(weights.isfinite().all()) for weights in state.values()):
        raise NonFinite(f"A weight became no number before checkpoint {path.name}.")
    torch.save(state, path)


class _Own(Trainer):  # type: ignore[misc]
    """What all three do otherwise than TRL."""

    def _send_telemetry(self) -> None:
        """Nobody is told."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing is printed or kept: the callers measure for themselves."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raises NonFinite before the step that would carry it into the weights."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise NonFinite(f"{type(self).__name__}'s loss became {loss.item()}.")
        return loss


class DPO(_Own, DPOTrainer):  # type: ignore[misc]
    """DPO on rows of `prompt_ids`, `chosen_ids`, `rejected_ids`, `ref_chosen_logps`, `ref_rejected_logps`.

    The reference comes with the rows. TRL's own would be the adapter as it is now, but KL is measured to the anchor.
    """

    def _prepare_dataset(self, dataset: datasets.Dataset, *rest: Any) -> datasets.Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: datasets.Dataset, *rest: Any) -> datasets.Dataset:
        return dataset


class ORPO(_Own, ORPOTrainer):  # type: ignore[misc]
    """ORPO on rows of `prompt_`, `chosen_` and `rejected_` `input_ids`, `attention_mask` and `labels` (-100 at the prompt)."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Rows come as token ids."""
        return feature

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, ...]:
        """As TRL's, but the likelihood of chosen replies is that of their own tokens, as in the paper (arXiv:2403.07691, eq. 6).

        TRL's counts the prompt's tokens too, which would teach the policy to write what users write.
        """
        chosen, rejected, logits, rejected_logits, _, *rest = super().concatenated_forward(model, batch)
        labels = batch["chosen_labels"][:, 1:]
        likelihood = nn.functional.cross_entropy(  # logits may be padded further, for longer rejected replies
            logits[:, : labels.shape[1]].flatten(0, 1).float(), labels.flatten()
        )
        odds = (each.clamp(max=NEARLY_CERTAIN) for each in (chosen, rejected))
        return (*odds, logits, rejected_logits, likelihood, *rest)


class SFT(_Own, SFTTrainer):  # type: ignore[misc]
    """SFT on rows of `input_ids` and `labels` (-100 at the prompt)."""
