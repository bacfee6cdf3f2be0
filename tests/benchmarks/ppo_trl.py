"""TRL 1.12.0's PPOTrainer on a job of the benchmark. Runs in .venv-trl, and so imports nothing of Ratchet's own.

Its settings favour speed: no gradient checkpointing (TRL's default is to have it, which trades time for memory), all prompts sampled
in one batch, a minibatch in one piece, no generation of samples to look at.
"""

import math
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.benchmarks.ppo_visit import Clock, Figures, Job, Memory, answer

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Sees when each iteration ends, and that both contestants do the same work."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.tick()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if logs["val/num_eos_tokens"]:
            raise ValueError(f"{logs['val/num_eos_tokens']} replies ended by themselves.")


def work(job: Job) -> Figures:
    """Policy, reference, reward model and value, each a model of its own as TRL has them; the reference of an adapter is its base."""
    torch.manual_seed(0)
    dtype = getattr(torch, job.dtype)
    tokenizer = AutoTokenizer.from_pretrained(job.base, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype)
    memory = Memory()
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(job.base, num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    adapter = LoraConfig(
        r=job.rank,
        lora_alpha=2 * job.rank,
        lora_dropout=0.0,
        target_modules=_adapted(policy.config.num_hidden_layers, job.layers),
        task_type="CAUSAL_LM",
    )
    prompts = Dataset.from_dict({"input_ids": job.prompts})
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=_settings(job, folder),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=reward,
            value_model=value,
            train_dataset=prompts,
            eval_dataset=prompts,
            callbacks=[watch],
            peft_config=adapter if job.rank else None,
        )
        trainer.train()
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    clock = watch.clock
    return Figures(clock.seconds, clock.cpu_seconds, memory.idle_mib, memory.peak_mib, trained, job.dtype)


def _adapted(layers: int, share: float) -> str:
    """A pattern of the names of what Ratchet adapts too: the linear layers of the last layers, and the output embeddings."""
    upper = "|".join(str(number) for number in range(layers - math.ceil(layers * share), layers))
    return rf"lm_head|.*\.({upper})\..*\.({'|'.join(LINEAR)})"


def _settings(job: Job, folder: str) -> PPOConfig:
    return PPOConfig(
        output_dir=folder,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=job.dtype == "bfloat16",
        gradient_checkpointing=False,
        # An optimiser step for each of these minibatches. The other way to have minibatches, by gradient accumulation, steps once
        # for all of them together.
        per_device_train_batch_size=job.samples,
        num_mini_batches=job.samples // job.minibatch,
        num_ppo_epochs=job.epochs,
        total_episodes=job.samples * (job.iterations + 1),
        local_rollout_forward_batch_size=job.samples,
        response_length=job.reply_tokens,
        temperature=1.0,
        num_sample_generations=0,
        learning_rate=1e-5,
    )


if __name__ == "__main__":
    answer(work)
