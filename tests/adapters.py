"""Small policy folders that are right, for tests to do harm to. No torch."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.policies import MERGED
from service.weights import CONFIG, WEIGHTS

Tensors = Mapping[str, Sequence[Sequence[float]]]
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
ADAPTER: Tensors = {
    f"{MODULE}.lora_A.weight": [[0.5, -0.5, 1.0]],
    f"{MODULE}.lora_B.weight": [[1.0], [2.0]],
}
"""Of rank 1, from 3 inputs to 2 outputs."""
BASE_WEIGHTS: Tensors = {"model.layers.0.self_attn.q_proj.weight": [[0.0] * 3] * 2, "lm_head.weight": [[0.0]]}


def safetensors(tensors: Tensors) -> bytes:
    """A file of float32 matrices."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, rows in tensors.items():
        values = [value for row in rows for value in row]
        packed = struct.pack(f"<{len(values)}f", *values)
        shape = [len(rows), len(rows[0])]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(packed)]}
        data += packed
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def write_base(folder: Path) -> Path:
    """What of a base model's folder is looked at."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(safetensors(BASE_WEIGHTS))
    return folder


def write_policy(
    folder: Path,
    probe: object,
    tensors: Tensors = ADAPTER,
    content: bytes | None = None,
    merged: Tensors | None = None,
    **manifest: object,
) -> Path:
    """A policy's folder whose sha256 are right, whatever is in it. content: of the weights' file, instead of `tensors`.

    merged: of the whole model, for engines that take no adapters. Where the manifest says `tuning="full"` there is no adapter.
    """
    folder.mkdir(parents=True)
    names = []
    if manifest.get("tuning") != "full":
        (folder / WEIGHTS).write_bytes(safetensors(tensors) if content is None else content)
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}))
        names += [WEIGHTS, CONFIG]
    if merged is not None:
        (folder / MERGED).mkdir()
        names.append(f"{MERGED}/model.safetensors")
        (folder / names[-1]).write_bytes(safetensors(merged))
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    written = {"name": folder.name, "files": files, "probe": probe, "probe_tolerance": 0.1}
    (folder / "manifest.json").write_text(json.dumps(written | manifest))
    (folder / "READY").touch()
    return folder
