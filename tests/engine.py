"""Starts one real vLLM on the CPU, with the tiny model, for the tests marked `engine`."""

import itertools
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from service.engine_process import engine_command, engine_environment
from service.settings import Settings

START_SECONDS = 400
MOST_ADAPTERS = 3
_ports = itertools.count(os.getpid())


def free_port() -> int:
    """A port of the loopback address that nobody listens on now, and that neither the system nor another worker gives to anybody."""
    first = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = first + next(_ports) % 1_000
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def running_engine(
    model: Path, log: Path, delivery: Literal["adapter", "merged"] = "adapter"
) -> Iterator[str]:
    """The address of a vLLM that answers; ended with its children. Raises RuntimeError with its log."""
    port = free_port()
    settings = Settings(
        engine_port=port, max_model_tokens=512, engine_max_adapters=MOST_ADAPTERS, delivery=delivery
    )
    command = engine_command(settings, model)
    with log.open("wb") as output:
        engine = subprocess.Popen(
            command,
            env=os.environ | engine_environment(settings, model),
            stdout=output,
            stderr=output,
            start_new_session=True,
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
