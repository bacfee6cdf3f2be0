"""Writing a policy's folder: adapter or whole model, manifest, probe, and, last, READY. Whole or not at all."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.policies import MERGED
from service.weights import CONFIG
from trainer.batches import Batch
from trainer.models import BASE_MODEL, POLICY, Roles
from trainer.rollouts import Rollout

NUM_PROBES = 4
PROBE_TOLERANCE = 0.15
"""Nats per token, mean absolute: an engine that gives the base's own log-probabilities no better than that has another base.
The policy's own tolerance is tighter: the service derives it from how well the engine gives the base's."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a policy comes from."""

    name: str
    parent: str
    anchor: str
    """That KL was measured to; its own name, where it is to be the anchor of what comes after it."""
    base: str
    cycle: int
    snapshot: str
    seed: int
    settings: dict[str, Any]
    metrics: dict[str, Any]


def publish(
    roles: Roles, rollouts: Sequence[Rollout], lineage: Lineage, policies: Path, *, merged: bool = False
) -> Path:
    """The folder of a new policy, for which `rollouts` give the probes. Raises FileExistsError where its name is taken.

    merged: with the whole model too, for engines that are given no adapters. With full fine-tuning there is nothing else.
    """
    folder = policies / lineage.name
    if (folder / "READY").exists():
        raise FileExistsError(f"{lineage.name} is there already: names are never reused.")
    shutil.rmtree(folder, ignore_errors=True)  # without READY: left by a cycle that was cut off
    partial = policies / f".{lineage.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if roles.origin.tuning == "lora":
        save_adapter(roles, partial)
    if merged or roles.origin.tuning == "full":
        save_merged(roles, partial / MERGED)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {
        "name": lineage.name,
        "parent": lineage.parent,
        "anchor": lineage.anchor,
        "base": lineage.base,
        "tuning": roles.origin.tuning,
        "cycle": lineage.cycle,
        "snapshot": lineage.snapshot,
        "seed": lineage.seed,
        "revision": code_revision(),
        "settings": lineage.settings,
        "metrics": lineage.metrics,
        "files": {path.relative_to(partial).as_posix(): sha256_of(path) for path in files},
        "probe": make_probes(roles, rollouts),
        "probe_tolerance": PROBE_TOLERANCE,
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    partial.rename(folder)
    (folder / "READY").touch()
    return folder.resolve()


def save_adapter(roles: Roles, folder: Path) -> None:
    """The policy's adapter in PEFT's format, directly in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # Else PEFT adds the base's output embeddings where they are adapted.
    roles.model.save_pretrained(folder, selected_adapters=[POLICY], save_embedding_layers=False)
    inner = folder / POLICY  # PEFT puts an adapter that is not called "default" into a folder of its own
    if inner.is_dir():
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    config["target_modules"].sort()  # PEFT writes a set, in another order in each process
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


@torch.no_grad()
def save_merged(roles: Roles, folder: Path) -> None:
    """The base's own files, with what the policy has made of each weight: in float32, and rounded once.

    Raises ValueError where the base has no such weights, as where they are not in safetensors.
    """
    folder.mkdir(parents=True)
    base = Path(roles.origin.base)
    changes = _adapter_changes(roles) if roles.origin.tuning == "lora" else _new_weights(roles)
    for path in sorted(base.glob("*.safetensors")):
        tensors = load_file(path)
        for name, weights in tensors.items():
            found = next((each for each in changes if name in names_in_files(each)), None)
            if found is not None:
                tensors[name] = changes.pop(found)(weights).to(weights.dtype).contiguous()
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    if changes:
        raise ValueError(
            f"{base} has no weights in safetensors for {next(iter(changes))}: it cannot be merged."
        )
    for pattern in ("*.safetensors.index.json", "config.json", "generation_config.json"):
        for path in base.glob(pattern):
            shutil.copy(path, folder / path.name)


def names_in_files(name: str) -> tuple[str, str]:
    """What a model's weights may be called in its files: some leave out the model's own prefix (`transformer.`)."""
    return name, name.partition(".")[2]


Change = Callable[[Tensor], Tensor]
"""From the base's weights to the policy's."""


def _adapter_changes(roles: Roles) -> dict[str, Change]:
    """By the name of the weights that a layer adapts."""

    def adding(layer: LoraLayer) -> Change:
        return lambda weights: weights.float() + layer.get_delta_weight(POLICY).to(weights.device).float()

    return {
        f"{name.removeprefix('base_model.model.')}.weight": adding(layer)
        for name, layer in roles.model.named_modules()
        if isinstance(layer, LoraLayer) and POLICY in layer.lora_A
    }


def _new_weights(roles: Roles) -> dict[str, Change]:
    """By name; those that are not trained stay the base's. What is written is rounded in `roles` too, where probes are made of it."""

    def replacing(trained: Tensor) -> Change:
        return lambda weights: trained.copy_(trained.to(weights.dtype)).to(weights.device)

    return {name: replacing(weights) for name, weights in roles.policy_weights().items()}


@torch.no_grad()
def make_probes(roles: Roles, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """A few of the policy's own replies with the log-probability of each of their tokens, by the policy and by the base; null for
    the prompts'. What the base's are off by in an engine tells how exact its arithmetic is."""
    chosen = sorted(rollouts, key=lambda rollout: len(rollout.reply_ids))[-NUM_PROBES:]
    probes = []
    for rollout in chosen:
        batch = Batch.collate([(rollout.prompt_ids, rollout.reply_ids)], roles.pad_id, roles.device)
        logprobs = roles.logprobs(batch)[0].tolist()
        base_logprobs = roles.logprobs(batch, role=BASE_MODEL)[0].tolist()
        start = len(rollout.prompt_ids)
        probes.append(
            {
                "token_ids": rollout.prompt_ids + rollout.reply_ids,
                "logprobs": [None] * start + logprobs[start:],
                "base_logprobs": [None] * start + base_logprobs[start:],
            }
        )
    return probes


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_revision() -> str:
    """The commit that the code was at, or the package's version where there is no repository."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return found.stdout.strip() or importlib.metadata.version("ratchet")
