"""Starts one real vLLM on the CPU, with the tiny model, for the tests marked `engine`."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 150
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # a model this tiny is no faster with more, and threads that wait for each other spin
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",  # else the first request for log-probabilities stalls the engine for 20 s
}


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_engine(model: Path, log: Path) -> Iterator[str]:
    """The address of a vLLM that answers; ended with its children. Raises RuntimeError with its log."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "policy-000000", "--enforce-eager", "--dtype", "bfloat16",
        "--max-model-len", "512", "--enable-lora", "--max-loras", "3", "--max-lora-rank", "32",
    ]  # fmt: skip
    with log.open("wb") as output:
        engine = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_answering(f"http://127.0.0.1:{port}/health", engine, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(engine.pid, signal.SIGTERM)
        try:
            engine.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(engine.pid, signal.SIGKILL)
            engine.wait()


def _wait_until_answering(url: str, engine: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and engine.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError("vLLM did not start:\n" + log.read_text(errors="replace")[-4000:])
