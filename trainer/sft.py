"""Supervised fine-tuning, by TRL: a policy that replies as people showed it, in demonstrations and corrections.

The loss is on the replies alone. Some prompts' demonstrations are held out, and the epoch that finds them likeliest is kept: a few
hundred of them are soon learnt by heart. What comes out can become a new anchor: see `anchoring.py`.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback

from trainer.iterations import checkpoint_path
from trainer.models import Roles
from trainer.preferences import Demonstrated
from trainer.trl_trainers import SFT, Schedule, SFTConfig, keep_checkpoint, lend


@dataclass(frozen=True, slots=True)
class SFTSettings:
    """How the policy is trained. One default for every model."""

    epochs: int = 10
    """At most; the held-out loss usually ends it earlier."""
    batch: int = 16
    """Demonstrations in an optimiser step."""
    learning_rate_times_width: float = 0.2
    """Learning rate times hidden size: 1e-3 at 192, 5e-5 at 4096."""
    held_out: float = 0.2
    """Share of prompts whose demonstrations are only measured on."""
    patience: int = 2
    """Epochs without a lower held-out loss after which the run ends."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """What was measured after an epoch; number 0 is the policy that it began with."""

    number: int
    held_out_loss: float
    """Mean -log-probability of a held-out reply's token, nats."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A finished run."""

    epochs: list[Epoch]
    kept: int
    """The epoch with the least held-out loss; 0 where training made it worse."""
    why: str
    """Why the run ended where it did."""


def train(
    roles: Roles,
    demonstrations: Sequence[Demonstrated],
    settings: SFTSettings,
    seed: int,
    checkpoints: Path,
    on_epoch: Callable[[Epoch], None],
) -> Tuned:
    """Trains the policy in `roles`, and leaves the kept epoch's weights there; every epoch's are in `checkpoints`.

    Raises NonFinite, and ValueError where the demonstrations are on fewer than two prompts.
    """
    training, held_out = split(demonstrations, settings.held_out, seed)
    checkpoints.mkdir(parents=True, exist_ok=True)
    watch = _Watch(roles, held_out, checkpoints, settings.patience, on_epoch)
    watch.look()
    num_steps = settings.epochs * math.ceil(len(training) / settings.batch)
    rate = settings.learning_rate_times_width / roles.hidden_size
    with lend(roles) as lent:
        # TRL's default length cuts replies off, without a word.
        arguments = lent.arguments(
            SFTConfig, Schedule(num_steps, settings.batch, rate, seed), max_length=None
        )
        rows = datasets.Dataset.from_list([_as_row(each) for each in training])
        trainer = SFT(lent.model, args=arguments, train_dataset=rows, processing_class=lent.tokenizer)
        trainer.add_callback(watch)
        trainer.train()
    kept = watch.best.number
    roles.load_policy_state(torch.load(checkpoint_path(checkpoints, kept), weights_only=True))
    return Tuned(watch.epochs, kept, watch.why)


def split(
    demonstrations: Sequence[Demonstrated], share: float, seed: int
) -> tuple[list[Demonstrated], list[Demonstrated]]:
    """Training and held-out ones, at least one prompt on each side; raises ValueError where there are not two."""
    groups = sorted({each.source.group for each in demonstrations})
    if len(groups) < 2:
        raise ValueError(
            f"The demonstrations are on {len(groups)} prompts, and 2 are needed: one is held out."
        )
    random.Random(seed).shuffle(groups)
    held = set(groups[: min(len(groups) - 1, math.ceil(len(groups) * share))])
    return [each for each in demonstrations if each.source.group not in held], [
        each for each in demonstrations if each.source.group in held
    ]


def measure_loss(roles: Roles, demonstrations: Sequence[Demonstrated], batch_size: int = 64) -> float:
    """Mean -log-probability of a reply's token by the policy, nats."""
    total = -measure_logprobs(roles, demonstrations, batch_size).sum().item()
    return total / sum(len(each.reply) for each in demonstrations)


@torch.no_grad()
def measure_logprobs(
    roles: Roles, demonstrations: Sequence[Demonstrated], batch_size: int = 64
) -> torch.Tensor:
    """[D] log-probability of each whole reply by the policy, in the order given; batched by length."""
    order = sorted(
        range(len(demonstrations)),
        key=lambda index: len(demonstrations[index].prompt) + len(demonstrations[index].reply),
    )
    found = torch.zeros(len(order), dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        sequences = [(demonstrations[index].prompt, demonstrations[index].reply) for index in indices]
        batch = roles.batch(sequences)
        found[indices] = roles.logprobs(batch).sum(1).double().cpu()
    return found


def _as_row(demonstration: Demonstrated) -> dict[str, list[int]]:
    return {
        "input_ids": demonstration.prompt + demonstration.reply,
        "labels": [-100] * len(demonstration.prompt) + demonstration.reply,
    }


@dataclass(slots=True)
class _Watch(TrainerCallback):  # type: ignore[misc]
    """Looks at the policy after every epoch, and ends the run."""

    roles: Roles
    held_out: Sequence[Demonstrated]
    checkpoints: Path
    patience: int
    on_epoch: Callable[[Epoch], None]
    epochs: list[Epoch] = field(default_factory=list)
    why: str = "all epochs were done"

    @property
    def best(self) -> Epoch:
        return min(self.epochs, key=lambda epoch: epoch.held_out_loss)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """TRL calls it after each pass over the demonstrations."""
        if self.look():
            control.should_training_stop = True

    def look(self) -> bool:
        """Keeps a checkpoint and measures it. Returns whether the run should end."""
        number = len(self.epochs)
        keep_checkpoint(self.roles, checkpoint_path(self.checkpoints, number))
        model = self.roles.model.get_base_model()
        training = model.training
        self.roles.eval()
        loss = measure_loss(self.roles, self.held_out)
        model.train(training)
        self.epochs.append(Epoch(number, loss))
        self.on_epoch(self.epochs[-1])
        if number - self.best.number >= self.patience:
            self.why = f"the held-out loss was no lower for {self.patience} epochs"
            return True
        return False
