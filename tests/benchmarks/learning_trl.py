"""TRL 1.12.0's trainers on the votes of a lesson. Runs in .venv-trl, and so imports nothing of Ratchet's own.

    python -m tests.benchmarks.learning_trl FOLDER

`FOLDER/job.json` is a `Job`; what is learnt goes beside it. Whatever a job does not name is TRL's default. All weights are trained,
in float32: with an adapter, DPO's default learning rates hardly move so small a model.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer

MODEL = "model"
MARGINS = "margins.json"
MINIBATCHES = 4
"""Of an iteration, as ours has."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to do."""

    method: str
    """`reward`, `ppo` or `dpo`."""
    base: str
    seed: int
    threads: int
    pairs: list[dict[str, Any]]
    """Votes that prefer one reply, in TRL's conversational format."""
    fresh: list[dict[str, Any]]
    """`reward`: other votes, for which it writes the margins of chosen over rejected."""
    reward: str = ""
    """`ppo`: folder of the reward model."""
    prompts: tuple[list[int], ...] = ()
    """`ppo`: as token ids."""
    kl_coef: float = 0.0
    learning_rate: float = 0.0
    samples: int = 0
    """`ppo`: replies in an iteration."""
    iterations: int = 0
    epochs: int = 0
    """`ppo`: passes over an iteration's replies."""
    reply_tokens: int = 0


def reward(job: Job, folder: Path) -> None:
    """And the margins that it gives the fresh votes."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    model = AutoModelForSequenceClassification.from_pretrained(job.base, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**_common(job, folder)),
        train_dataset=Dataset.from_list(job.pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / MODEL))
    model.eval()
    margins = _scores(model, tokenizer, job.fresh, "chosen") - _scores(
        model, tokenizer, job.fresh, "rejected"
    )
    (folder / MARGINS).write_text(json.dumps(margins.tolist()))


@torch.no_grad()
def _scores(model: Any, tokenizer: Any, pairs: list[dict[str, Any]], which: str) -> torch.Tensor:
    found = []
    for start in range(0, len(pairs), 64):
        texts = [
            tokenizer.apply_chat_template(pair["prompt"] + pair[which], tokenize=False)
            for pair in pairs[start : start + 64]
        ]
        batch = tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        )
        found.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0])
    return torch.cat(found).float()


def dpo(job: Job, folder: Path) -> None:
    """From the votes directly."""
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32),
        args=DPOConfig(**_common(job, folder), learning_rate=job.learning_rate),
        train_dataset=Dataset.from_list(job.pairs),
        processing_class=AutoTokenizer.from_pretrained(job.base),
    )
    trainer.train()
    trainer.save_model(str(folder / MODEL))


def ppo(job: Job, folder: Path) -> None:
    """Against the reward model, which the value begins as."""
    tokenizer = AutoTokenizer.from_pretrained(job.base, padding_side="left")
    models = [
        AutoModelForSequenceClassification.from_pretrained(job.reward, num_labels=1, dtype=torch.float32)
        for _ in range(2)
    ]
    prompts = Dataset.from_dict({"input_ids": list(job.prompts)})
    trainer = PPOTrainer(
        args=PPOConfig(
            **_common(job, folder),
            learning_rate=job.learning_rate,
            kl_coef=job.kl_coef,
            per_device_train_batch_size=job.samples,
            num_mini_batches=MINIBATCHES,
            num_ppo_epochs=job.epochs,
            total_episodes=job.samples * job.iterations,
            local_rollout_forward_batch_size=job.samples,
            response_length=job.reply_tokens,
            stop_token="eos",
            missing_eos_penalty=1.0,  # as in TRL's own example
            temperature=1.0,
            num_sample_generations=0,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32),
        ref_model=None,
        reward_model=models[0],
        value_model=models[1],
        train_dataset=prompts,
        eval_dataset=prompts,
    )
    trainer.train()
    trainer.model.policy.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)


def _common(job: Job, folder: Path) -> dict[str, Any]:
    """Prints and keeps nothing; the machine's arithmetic."""
    return {
        "output_dir": str(folder / "out"),
        "seed": job.seed,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,  # slower, and no other result
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


METHODS = {"reward": reward, "ppo": ppo, "dpo": dpo}

if __name__ == "__main__":
    here = Path(sys.argv[1])
    asked = Job(**json.loads((here / "job.json").read_text()))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)
    METHODS[asked.method](asked, here)
