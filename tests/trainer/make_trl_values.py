"""Writes `trl_values.json`: what TRL 1.12.0's PPOTrainer computes between sampling and loss, on one small batch.

    deploy/setup.sh trl; PYTHONPATH=. .venv-trl/bin/python -m tests.trainer.make_trl_values

All of it is TRL's own arithmetic. The real trainer runs on a tiny Llama with random weights, once with each KL estimator; three
of the functions that its `train` calls are wrapped, and what `train` has in its local variables at that moment is copied:

- at `masked_whiten`: log-probabilities of policy and reference, values, scores, masks, KL, rewards per token, returns, and the
  advantages before whitening; `masked_whiten`'s result is the whitened ones.
- at `masked_mean` of the policy's loss: new log-probabilities, both surrogates, losses per token; its result is the loss.

Only `masked_whiten` and `masked_mean` are functions in TRL; the rest stands in the body of `train`, hence the wrapping.
"""

import inspect
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from tests.tiny_model import make_model

OUT = Path(__file__).with_name("trl_values.json")
PROMPTS = [[40, 41, 42], [50, 51, 52], [60, 61, 62], [70, 71, 72]]
REPLY_TOKENS = 6
STOP_ID = 1
DIGITS = 9
"""Significant ones that are kept of a float32: enough to give it back exactly."""

ROLLOUT = (
    "logprobs",
    "ref_logprobs",
    "values",
    "scores",
    "padding_mask",
    "padding_mask_p1",
    "kl",
    "rewards",
    "returns",
)
UPDATE = ("new_logprobs", "mb_logprobs", "mb_advantage", "pg_losses", "pg_losses2", "pg_loss_max")


class Capture:
    """What `train` had in its variables, in the order in which it called."""

    def __init__(self) -> None:
        self.rollout: dict[str, Any] = {}
        self.updates: list[dict[str, Any]] = []

    def whiten(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
            result = original(values, mask, shift_mean)
            found = _caller(ROLLOUT)
            self.rollout = found | {"advantages": _plain(values), "whitened": _plain(result)}
            return result

        return wrapped

    def mean(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
            result = original(values, mask, axis)
            frame = inspect.currentframe()
            assert frame is not None
            assert frame.f_back is not None
            if values is frame.f_back.f_locals.get("pg_loss_max"):
                self.updates.append(_caller(UPDATE) | {"mask": _plain(mask), "loss": result.item()})
            return result

        return wrapped


def _caller(names: tuple[str, ...]) -> dict[str, Any]:
    """Copies of variables of the function that called the function that calls this."""
    frame = inspect.stack()[2].frame
    return {name: _plain(frame.f_locals[name]) for name in names}


def _plain(tensor: Tensor) -> Any:
    def rounded(value: Any) -> Any:
        return [rounded(each) for each in value] if isinstance(value, list) else _round(value)

    return rounded(tensor.detach().tolist())


def _round(value: float | bool) -> float | int:
    return int(value) if isinstance(value, bool) else float(f"{value:.{DIGITS}g}")


def capture(base: Path, estimator: str, seed: int) -> dict[str, Any]:
    """One rollout and the updates of two passes over it by the real trainer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        config = PPOConfig(
            output_dir=folder, report_to=[], save_strategy="no", use_cpu=True, bf16=False, seed=seed,
            per_device_train_batch_size=len(PROMPTS), total_episodes=len(PROMPTS), num_ppo_epochs=2, num_mini_batches=1,
            response_length=REPLY_TOKENS, temperature=1.0, stop_token_id=STOP_ID, num_sample_generations=0,
            kl_coef=0.3, kl_estimator=estimator, gamma=0.9, lam=0.8, cliprange=0.2,
            learning_rate=2e-4, gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        torch.manual_seed(seed)
        data = Dataset.from_dict({"input_ids": PROMPTS})
        policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        policy.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        with torch.no_grad():
            policy.lm_head.bias[STOP_ID] = 7.0  # or hardly any reply would end early
            for parameter in reference.parameters():  # or the KL would be 0
                parameter += 0.02 * torch.randn_like(parameter)
        reward, value = (
            AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
            for _ in range(2)
        )
        trainer = PPOTrainer(
            args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
            train_dataset=data, eval_dataset=data, value_model=value,
        )  # fmt: skip
        found = Capture()
        originals = ppo_trainer.masked_whiten, ppo_trainer.masked_mean
        ppo_trainer.masked_whiten = found.whiten(originals[0])
        ppo_trainer.masked_mean = found.mean(originals[1])
        try:
            trainer.train()
        finally:
            ppo_trainer.masked_whiten, ppo_trainer.masked_mean = originals
    settings = {name: getattr(config, name) for name in ("kl_coef", "gamma", "lam", "cliprange")}
    return {"settings": settings, "rollout": found.rollout, "updates": found.updates}


def main() -> None:
    """With the first seed with which replies end at different places, and some do not end at all."""
    with tempfile.TemporaryDirectory() as folder:
        base = make_model(Path(folder))
        for seed in itertools.count():
            k1 = capture(base, "k1", seed)
            lengths = [row.count(0) for row in k1["rollout"]["padding_mask"]]
            if REPLY_TOKENS in lengths and len(set(lengths)) > 2:
                break
        k3 = capture(base, "k3", seed)
    OUT.write_text(json.dumps({"k1": k1, "k3": k3}) + "\n")


if __name__ == "__main__":
    main()
