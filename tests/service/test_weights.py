"""Damaged adapters, each kind many times over: refused with the reason, before an engine sees them."""

import json
import math
import random
import struct
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from service.errors import PolicyRefused
from service.policies import MERGED, read_folder
from service.weights import CONFIG, WEIGHTS, check_adapter
from tests.adapters import ADAPTER, BASE_WEIGHTS, MODULE, Tensors, safetensors, write_base, write_policy

A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
PROBE = [{"token_ids": [1, 2], "logprobs": [None, -1.0], "base_logprobs": [None, -1.0]}]
RIGHT = safetensors(ADAPTER)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def test_an_adapter_that_fits_is_taken(tmp_path: Path, base: Path) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE)
    assert read_folder("policy-000001", folder, base).name == "policy-000001"
    assert read_folder("policy-000001", folder, None).name == "policy-000001"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({A: ADAPTER[A]}, "has no counterpart"),
        ({B: ADAPTER[B]}, "is no part of an adapter"),
        ({}, "adapts nothing"),
        (ADAPTER | {"surprise": [[1.0]]}, "surprise is no part of an adapter"),
        (ADAPTER | {A: [[1.0] * 3] * 2}, "not of rank 1"),
        (ADAPTER | {A: [[1.0] * 4]}, "is .2, 3. in the base"),
        (ADAPTER | {B: [[1.0]] * 5}, "is .2, 3. in the base"),
        (
            {name.replace("layers.0", "layers.7"): rows for name, rows in ADAPTER.items()},
            "the base has no model.layers.7.self_attn.q_proj",
        ),
        (ADAPTER | {A: [[0.0, math.nan, 0.0]]}, "not numbers"),
        (ADAPTER | {B: [[math.inf], [0.0]]}, "not numbers"),
        (ADAPTER | {B: [[0.0], [-math.inf]]}, "not numbers"),
    ],
)
def test_one_that_does_not_fit_says_why(tmp_path: Path, base: Path, tensors: object, reason: str) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE, tensors=tensors)  # type: ignore[arg-type]
    with pytest.raises(PolicyRefused, match=reason):
        check_adapter(folder, base)


@pytest.mark.parametrize(
    ("merged", "reason"),
    [
        (None, "it was made with another RATCHET_DELIVERY"),
        ({}, "has no weights"),
        ({"lm_head.weight": [[0.0]]}, "its whole model leaves out model.layers.0.self_attn.q_proj.weight"),
        (BASE_WEIGHTS | {"lm_head.weight": [[math.nan]]}, "not numbers"),
        (BASE_WEIGHTS | {"surprise": [[1.0]]}, "surprise is .1, 1., and not there in the base"),
        (BASE_WEIGHTS | {"lm_head.weight": [[1.0, 2.0]]}, "is .1, 2., and .1, 1. in the base"),
    ],
)
def test_a_whole_model_that_does_not_fit_says_why(
    tmp_path: Path, base: Path, merged: Tensors | None, reason: str
) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE, merged=merged)
    with pytest.raises(PolicyRefused, match=reason):
        read_folder("policy-000001", folder, base, merged=True)


def test_a_policy_that_is_a_whole_model_needs_no_adapter_and_merged_delivery(
    tmp_path: Path, base: Path
) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE, merged=BASE_WEIGHTS, tuning="full")
    assert read_folder("policy-000001", folder, base, merged=True).tuning == "full"
    with pytest.raises(PolicyRefused, match="whole model without an adapter: set RATCHET_DELIVERY=merged"):
        read_folder("policy-000001", folder, base)


@pytest.mark.parametrize(
    ("merged", "reason"),
    [
        (None, "it was made with another RATCHET_DELIVERY"),
        ({"lm_head.weight": [[0.0]]}, "its whole model leaves out model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_policy_that_is_a_whole_model_must_fit_the_base_all_the_same(
    tmp_path: Path, base: Path, merged: Tensors | None, reason: str
) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE, merged=merged, tuning="full")
    with pytest.raises(PolicyRefused, match=reason):
        read_folder("policy-000001", folder, base, merged=True)


def test_a_whole_model_is_only_looked_at_where_it_is_served(tmp_path: Path, base: Path) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE, merged=BASE_WEIGHTS)
    for merged in (True, False):
        assert read_folder("policy-000001", folder, base, merged=merged).name == "policy-000001"
    (folder / MERGED / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(PolicyRefused, match="sha256 differs"):
        read_folder("policy-000001", folder, base)


def test_a_file_of_weights_that_the_manifest_does_not_name_is_refused(tmp_path: Path, base: Path) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE, merged=BASE_WEIGHTS)
    (folder / MERGED / "more.safetensors").write_bytes(safetensors(BASE_WEIGHTS))
    with pytest.raises(PolicyRefused, match="does not name merged/more"):
        read_folder("policy-000001", folder, base, merged=True)


@pytest.mark.parametrize("file", ["../secret", "/etc/hostname", "merged/../../secret"])
def test_a_manifest_reaches_nothing_outside_of_its_folder(tmp_path: Path, file: str) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": manifest["files"] | {file: ""}}))
    with pytest.raises(PolicyRefused, match="outside of its folder"):
        read_folder("policy-000001", folder)


def test_one_that_leaves_a_module_out_says_which(tmp_path: Path, base: Path) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE)
    (base / "more.safetensors").write_bytes(
        safetensors({"model.layers.1.self_attn.q_proj.weight": [[0.0] * 3] * 2})
    )
    with pytest.raises(PolicyRefused, match=r"leaves out model\.layers\.1\.self_attn\.q_proj"):
        check_adapter(folder, base)


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        ("q_proj", True),
        ("1.self_attn.q_proj", True),
        ("model.layers.1.self_attn.q_proj", True),
        ("whole.model.layers.1.self_attn.q_proj", True),  # the checkpoint leaves the model's own prefix out
        ("0.self_attn.q_proj", False),
        ("11.self_attn.q_proj", False),
    ],
)
def test_a_module_is_left_out_where_a_target_means_it(
    tmp_path: Path, base: Path, target: str, refused: bool
) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": [target]}))
    (base / "more.safetensors").write_bytes(
        safetensors({"model.layers.1.self_attn.q_proj.weight": [[0.0] * 3] * 2})
    )
    with pytest.raises(PolicyRefused, match="leaves out") if refused else nullcontext():
        check_adapter(folder, base)


@pytest.mark.parametrize("config", [b"", b"{}", b'{"r": 2, "target_modules": ["q_proj"]}'])
def test_a_config_that_says_otherwise_is_refused(tmp_path: Path, base: Path, config: bytes) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE)
    (folder / CONFIG).write_bytes(config)
    with pytest.raises(PolicyRefused):
        check_adapter(folder, base)


def test_a_target_of_very_many_names_costs_no_time(tmp_path: Path, base: Path) -> None:
    folder = write_policy(tmp_path / "policy-000001", PROBE)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": ["." * 1_000_000]}))
    with pytest.raises(PolicyRefused, match="cannot be read"):
        check_adapter(folder, base)


def truncate(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def lengthen(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.randrange(1, 9))


def garble_header(content: bytes, chance: random.Random) -> bytes:
    return content[:8] + b"}" + content[9:]


def lie_of_length(content: bytes, chance: random.Random) -> bytes:
    return chance.choice([0, 3, 1 << 40, (1 << 64) - 1]).to_bytes(8, "little") + content[8:]


def poison(content: bytes, chance: random.Random) -> bytes:
    """One value that is not a number, anywhere."""
    place = len(content) - 4 * chance.randrange(1, 6)
    bad = chance.choice(
        [struct.pack("<I", 0x7FC00000 | chance.randrange(1 << 20)), struct.pack("<f", -math.inf)]
    )
    return content[:place] + bad + content[place + 4 :]


DAMAGE: list[Callable[[bytes, random.Random], bytes]] = [
    truncate,
    lengthen,
    garble_header,
    lie_of_length,
    poison,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_though_the_manifest_names_its_sha256(
    tmp_path: Path, base: Path, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    for seed in range(20):
        content = damage(RIGHT, random.Random(seed))
        folder = write_policy(tmp_path / str(seed) / "policy-000001", PROBE, content=content)
        with pytest.raises(PolicyRefused):
            read_folder("policy-000001", folder, base)


def test_a_flipped_bit_is_refused_by_its_sha256(tmp_path: Path, base: Path) -> None:
    for bit in range(0, 8 * len(RIGHT), 37):
        folder = write_policy(tmp_path / str(bit) / "policy-000001", PROBE)
        content = bytearray(RIGHT)
        content[bit // 8] ^= 1 << bit % 8
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(PolicyRefused, match="sha256 differs"):
            read_folder("policy-000001", folder, base)


@pytest.mark.parametrize(("dtype", "nan", "largest"), [("BF16", 0x7FC0, 0x7F7F), ("F16", 0x7E00, 0x7BFF)])
def test_numbers_of_two_bytes_are_looked_at_too(
    tmp_path: Path, base: Path, dtype: str, nan: int, largest: int
) -> None:
    for value, refused in ((nan, True), (nan | 0x8000, True), (largest, False), (0, False)):
        header = {}
        for number, (name, shape) in enumerate({A: [1, 3], B: [2, 1]}.items()):
            first = number * 6
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [first, first + 2 * shape[0] * shape[1]],
            }
        encoded = json.dumps(header).encode()
        content = len(encoded).to_bytes(8, "little") + encoded + struct.pack("<5H", 0, 0, 0, value, 0)
        folder = write_policy(tmp_path / f"{value}" / "policy-000001", PROBE, content=content)
        if refused:
            with pytest.raises(PolicyRefused, match="not numbers"):
                check_adapter(folder, base)
        else:
            check_adapter(folder, base)
