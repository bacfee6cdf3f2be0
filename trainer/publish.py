"""Writing a policy's folder: adapter, manifest, probe, and, last, READY. Whole or not at all."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import probe
from trainer.models import POLICY, Roles
from trainer.rollouts import Rollout


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a policy comes from."""

    name: str
    parent: str
    anchor: str
    base: str
    cycle: int
    snapshot: str
    seed: int
    settings: dict[str, Any]
    metrics: dict[str, Any]


def publish(roles: Roles, rollouts: Sequence[Rollout], lineage: Lineage, policies: Path) -> Path:
    """The folder of a new policy, for which `rollouts` give the probes. Raises FileExistsError where its name is taken."""
    folder = policies / lineage.name
    if (folder / "READY").exists():
        raise FileExistsError(f"{lineage.name} is there already: names are never reused.")
    shutil.rmtree(folder, ignore_errors=True)  # without READY: left by a cycle that was cut off
    partial = policies / f".{lineage.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(roles, partial)
    probed = probe.choose(rollouts)
    noise = probe.measure_noise(roles, probed)
    manifest = {
        "name": lineage.name,
        "parent": lineage.parent,
        "anchor": lineage.anchor,
        "base": lineage.base,
        "cycle": lineage.cycle,
        "snapshot": lineage.snapshot,
        "seed": lineage.seed,
        "revision": code_revision(),
        "settings": lineage.settings,
        "metrics": lineage.metrics,
        "files": {path.name: sha256_of(path) for path in sorted(partial.iterdir())},
        "probe": probe.make_probes(roles, probed),
        "probe_noise": asdict(noise),
        "probe_tolerance": probe.tolerance(noise),
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    partial.rename(folder)
    (folder / "READY").touch()
    return folder.resolve()


def save_adapter(roles: Roles, folder: Path) -> None:
    """The policy's adapter in PEFT's format, directly in `folder`."""
    folder.mkdir(parents=True)
    roles.model.save_pretrained(folder, selected_adapters=[POLICY])
    inner = folder / POLICY  # PEFT puts an adapter that is not called "default" into a folder of its own
    if inner.is_dir():
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()
    (folder / "README.md").unlink(missing_ok=True)


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
