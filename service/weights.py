"""What of an adapter's file can be told without torch: that it is whole, fits the base, and holds numbers alone.

vLLM accepts an adapter with a tensor too few and one with NaN without a word, so this is looked at before it is loaded; that it
computes what the trainer's did is the probe's to say, afterwards.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError

from service.errors import PolicyRefused

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MOST_HEADER_BYTES = 100 << 20
"""As the format's own limit."""
PREFIX = "base_model.model."
CHUNK_BYTES = 1 << 22
MOST_NAME = 512
"""Characters of a module's name."""


class TensorEntry(BaseModel):
    """One tensor of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class AdapterConfig(BaseModel):
    """What of `adapter_config.json` the weights must agree with."""

    r: int
    target_modules: list[Annotated[str, StringConstraints(max_length=MOST_NAME)]]


class NumberFormat(BaseModel):
    """Where a number's exponent lies, in bytes as they are stored (the lowest first): all ones mean infinite or not a number."""

    size: int
    high: int
    """Bits of the exponent in the last byte."""
    low: int
    """Bits of it in the byte before."""


FORMATS = {
    "F32": NumberFormat(size=4, high=0x7F, low=0x80),
    "BF16": NumberFormat(size=2, high=0x7F, low=0x80),
    "F16": NumberFormat(size=2, high=0x7C, low=0x00),
}
_entries = TypeAdapter(dict[str, TensorEntry])


def check_adapter(folder: Path, base: Path | None) -> None:
    """Raises PolicyRefused, saying what is wrong with the adapter. Reads all of it: off the loop.

    base: the base model's folder, where this machine has it; without it, shapes and names are only held against each other.
    """
    try:
        config = AdapterConfig.model_validate_json((folder / CONFIG).read_bytes())
        with (folder / WEIGHTS).open("rb") as file:
            tensors, start = _read_header(file)
            modules = _pair_up(tensors, config.r)
            if base is not None and base.is_dir():
                _check_against(modules, config.target_modules, _read_base(base))
            for name, entry in tensors.items():
                if not _is_finite(file, start, entry):
                    raise PolicyRefused(f"{name} holds values that are not numbers")
    except (OSError, ValidationError, ValueError) as error:
        raise PolicyRefused(f"its adapter cannot be read ({type(error).__name__})") from error


def check_model(folder: Path, base: Path | None) -> None:
    """Raises PolicyRefused, saying what is wrong with a whole model's files. Reads all of them: off the loop.

    base: as in `check_adapter`.
    """
    shapes: dict[str, list[int]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                tensors, start = _read_header(file)
                for name, entry in tensors.items():
                    if not _is_finite(file, start, entry):
                        raise PolicyRefused(f"{name} holds values that are not numbers")
            shapes |= {name: entry.shape for name, entry in tensors.items()}
        wanted = _read_shapes(base) if base is not None and base.is_dir() else {}
    except (OSError, ValidationError, ValueError) as error:
        raise PolicyRefused(f"its model cannot be read ({type(error).__name__})") from error
    if not shapes:
        raise PolicyRefused("its whole model has no weights")
    if not wanted:
        return
    for name, shape in shapes.items():
        if wanted.get(name) != shape:
            raise PolicyRefused(f"{name} is {shape}, and {wanted.get(name, 'not there')} in the base")
    for name in wanted.keys() - shapes.keys():
        raise PolicyRefused(f"its whole model leaves out {name}")


def _read_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all of a model's tensors; empty where its weights are not in safetensors."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            tensors, _ = _read_header(file)
        shapes |= {name: entry.shape for name, entry in tensors.items()}
    return shapes


def _read_header(file: BinaryIO) -> tuple[dict[str, TensorEntry], int]:
    """The tensors, and where their data begin. Raises ValueError where the data are not exactly what the header says."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, MOST_HEADER_BYTES):
        raise ValueError("no header")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = _entries.validate_python(header)
    if max((entry.data_offsets[1] for entry in tensors.values()), default=0) != size - 8 - length:
        raise ValueError("not as long as its header says")
    return tensors, 8 + length


def _pair_up(tensors: Mapping[str, TensorEntry], rank: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each module that is adapted. Raises PolicyRefused where A and B do not belong together."""
    modules: dict[str, tuple[int, int]] = {}
    for name, entry in tensors.items():
        module, part, weight = name.removeprefix(PREFIX).rpartition(".lora_A.")
        if not part:
            if name.replace(".lora_B.", ".lora_A.") not in tensors or ".lora_B." not in name:
                raise PolicyRefused(f"{name} is no part of an adapter")
            continue
        other = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if weight != "weight" or other is None:
            raise PolicyRefused(f"{name} has no counterpart")
        if len(entry.shape) != 2 or len(other.shape) != 2 or not entry.shape[0] == other.shape[1] == rank:
            raise PolicyRefused(
                f"{module}: its tensors {entry.shape} and {other.shape} are not of rank {rank}"
            )
        modules[module] = entry.shape[1], other.shape[0]
    if not modules:
        raise PolicyRefused("it adapts nothing")
    return modules


def _read_base(folder: Path) -> dict[str, list[int]]:
    """Shapes of the base's matrices, by module; empty where its weights are not in safetensors."""
    return {
        name.removesuffix(".weight"): shape for name, shape in _read_shapes(folder).items() if len(shape) == 2
    }


def _check_against(
    modules: Mapping[str, tuple[int, int]], targets: list[str], base: Mapping[str, list[int]]
) -> None:
    """Raises PolicyRefused where a module is not the base's, is of another shape, or is missing.

    A checkpoint may leave out the model's own prefix (`transformer.`), and some keep inputs first: both are taken.
    """
    if not base:
        return
    adapted = set[str]()
    for module, sizes in modules.items():
        name = module if module in base else module.partition(".")[2]
        if name not in base:
            raise PolicyRefused(f"the base has no {module}")
        if sorted(base[name]) != sorted(sizes):
            raise PolicyRefused(
                f"{module} is {base[name]} in the base, and the adapter's is for {list(sizes)}"
            )
        adapted.add(name)
    # A target means a module by its last names, or by all of them and a prefix that the checkpoint leaves out.
    last_names = set(targets)
    with_prefix = {ending for target in targets for ending in _endings(target)}
    for name in base:
        is_named = name in with_prefix or not last_names.isdisjoint(_endings(name))
        if is_named and name not in adapted:
            raise PolicyRefused(f"it leaves out {name}")


def _endings(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c` of `a.b.c`."""
    names = name.split(".")
    return (".".join(names[start:]) for start in range(len(names)))


def _is_finite(file: BinaryIO, start: int, entry: TensorEntry) -> bool:
    """Whether every value is a number. Raises ValueError for an unknown type, or a size that is not the shape's."""
    form = FORMATS.get(entry.dtype)
    first, last = entry.data_offsets
    if form is None or last - first != form.size * math.prod(entry.shape):
        raise ValueError("not of a known type and size")
    high = bytes(byte & form.high == form.high for byte in range(256))
    low = bytes(byte & form.low == form.low for byte in range(256))
    for chunk in _chunks(file, start + first, last - first):
        # Bit by bit over whole chunks, as one large integer each: in C, where a loop would take seconds.
        is_high = int.from_bytes(chunk[form.size - 1 :: form.size].translate(high))
        is_low = int.from_bytes(chunk[form.size - 2 :: form.size].translate(low))
        if is_high & is_low:
            return False
    return True


def _chunks(file: BinaryIO, start: int, num_bytes: int) -> Iterator[bytes]:
    """In pieces that hold whole numbers. Raises ValueError where the file ends before."""
    file.seek(start)
    while num_bytes:
        chunk = file.read(min(CHUNK_BYTES, num_bytes))
        if not chunk:
            raise ValueError("shorter than its header says")
        num_bytes -= len(chunk)
        yield chunk
