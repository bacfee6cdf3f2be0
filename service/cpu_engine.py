"""vLLM's server, with two faults of its CPU build mended: `python -m service.cpu_engine`, with vLLM's own options.

Requests for the base and for adapters share batches, and a row of the base says so by the index -1. vLLM's torch operations take that
for the last adapter there is room for: once so many have been loaded, the base answers as that one (vllm-project/vllm#48421, open in
vLLM 0.32). Its GPU kernels leave such rows out. Here they are set to zero after the first of the two products.

Attention on a CPU with AMX uses its tiles, which Linux has to be asked for first, once in a process. vLLM leaves that to whoever
multiplies matrices before; for a prompt of one token nobody does, and the engine ends by an illegal instruction.

What is done on import is done in the processes too that vLLM starts, whether by fork or by spawn.
"""

import runpy
import sys
from typing import Any

SERVER = "vllm.entrypoints.openai.api_server"


def without_adapter(shrink: Any) -> Any:
    """`bgmv_shrink`, but rows of index -1 are zero, and so is what they add to the base's."""

    def bgmv_shrink(inputs: Any, lora_a: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs, lora_a, output, indices, scaling)
        output[indices < 0] = 0.0

    return bgmv_shrink


def ask_for_tiles() -> None:
    """Of AMX, where the CPU has it; a process that is forked off has them too."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def mend() -> None:
    """To be called before vLLM takes the operation from where it is."""
    try:
        from vllm.lora.ops import torch_ops
        from vllm.lora.ops.torch_ops import lora_ops
    except ModuleNotFoundError as error:
        print(f"vLLM's operations for adapters are not where they were: {error}", file=sys.stderr)
        return
    lora_ops.bgmv_shrink = torch_ops.bgmv_shrink = without_adapter(lora_ops.bgmv_shrink)


if __name__ in ("__main__", "__mp_main__"):
    ask_for_tiles()
    mend()
if __name__ == "__main__":
    runpy.run_module(SERVER, run_name="__main__")
