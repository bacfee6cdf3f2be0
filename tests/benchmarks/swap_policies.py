"""The policies of `swap.py`: random adapters that tell each other apart, and the log-probabilities that each of them gives."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.swap_replies import TOLERANCE, Origin, Reply, origin, windows
from tests.tiny_model import make_policy
from trainer.batches import Batch

AT_ONCE = 64
COMPARED = 0.2
"""Share of replies that are compared with every policy, not only with the one that they name."""


def make_policies(folder: Path, base: Path, num: int, *, merged: bool = False) -> list[Path]:
    """Folders of policies, each with weights of its own. merged: with whole models."""
    return [
        make_policy(folder / f"policy-{number:06d}", base, seed=number, merged=merged)
        for number in range(1, num + 1)
    ]


def merge(base: Path, policy: Path, folder: Path) -> Path:
    """A whole model with the policy's weights, in a folder: what an engine without adapters loads."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), policy)
    model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


class Scorer:
    """All policies, in float32."""

    def __init__(self, base: Path, policies: Sequence[Path]) -> None:
        self.names = [policy.name for policy in policies]
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(model, policies[0], adapter_name=policies[0].name)
        for policy in policies[1:]:
            self._model.load_adapter(policy, adapter_name=policy.name)
        self._model.eval()

    @torch.no_grad()
    def deviations(self, replies: Sequence[Reply], name: str) -> list[list[float]]:
        """For each reply, by how much each token's reported log-probability differs from this policy's, in nats."""
        self._model.set_adapter(name)
        result = []
        for start in range(0, len(replies), AT_ONCE):
            some = replies[start : start + AT_ONCE]
            pairs = [(self._prompt_ids(reply.prompt), reply.token_ids) for reply in some]
            batch = Batch.collate(pairs, self._tokenizer.pad_token_id, torch.device("cpu"))
            scores = self._model(input_ids=batch.ids).logits[:, :-1].float().log_softmax(-1)
            computed = scores.gather(-1, batch.ids[:, 1:, None])[..., 0]  # (B, L - 1)
            for row, mask, reply in zip(computed, batch.reply_mask[:, 1:], some, strict=True):
                result.append((row[mask.bool()] - torch.tensor(reply.logprobs)).abs().tolist())
        return result

    def _prompt_ids(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids


def find_origins(replies: Sequence[Reply], scorer: Scorer) -> list[Origin]:
    """Whose each reply is. One that does not fit the policy that it names, or names none, is compared with all."""
    chance = random.Random(0)
    compared = [len(reply.labels & set(scorer.names)) != 1 or chance.random() < COMPARED for reply in replies]
    found: list[dict[str, list[float]]] = [{} for _ in replies]

    def compare(name: str, numbers: Sequence[int]) -> None:
        scores = scorer.deviations([replies[number] for number in numbers], name)
        for number, deviations in zip(numbers, scores, strict=True):
            found[number][name] = deviations

    for name in scorer.names:
        compare(name, [i for i, reply in enumerate(replies) if compared[i] or name in reply.labels])
    strange = [
        i for i, scores in enumerate(found) if min(max(windows(d)) for d in scores.values()) > TOLERANCE
    ]
    for name in scorer.names:
        compare(name, [i for i in strange if name not in found[i]])
    return [origin(scores) for scores in found]
