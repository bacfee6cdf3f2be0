"""Starts and ends what `make bench-gateway` measures: Ratchet, its peers, and the engine behind them.

Each is started as its users start it, with default settings apart from ports, its own logging to a database off (but for
Ratchet, which always stores every reply), in a session of its own that is ended with the `with` block. Loopback only.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from sqlalchemy import func, select

from service import embedded, schema
from service.database import sync_engine, sync_sessions
from service.engine_process import engine_command, engine_environment
from service.policies import BASE, ensure_base
from service.settings import Settings
from service.tables import Reply
from tests.benchmarks.gateway_engine import ONE_BY_ONE
from tests.benchmarks.gateway_load import Address
from tests.engine import free_port

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers"
"""The environment of LiteLLM and TensorZero, from requirements/peers.txt."""
PEERS_MODEL = "mock"
START_SECONDS = 180.0
STOP_SECONDS = 20.0
LITELLM_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # prices from the package instead of the network
    "LITELLM_LOG": "ERROR",  # no line a request
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # no keys, as with the others
}


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something that answers chat requests."""

    name: str
    address: Address
    path: str
    model: str
    processes: dict[str, psutil.Process]
    """Whose CPU time its answers cost, each with its children; empty for the mock asked directly."""
    num_stored: Callable[[], int] | None = None
    """Replies that it has stored, if it does."""


@contextmanager
def mock_engine(logs: Path, *, one_by_one: bool) -> Iterator[tuple[Contestant, psutil.Process]]:
    """The mock, as the contestant `direct`, and its process."""
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.gateway_engine", str(port)]
    if one_by_one:
        command.append(ONE_BY_ONE)
    with _running("mock", command, logs) as process:
        _wait_for(f"http://127.0.0.1:{port}/health", process, logs / "mock.log")
        yield _direct("direct", port, {}), psutil.Process(process.pid)


@contextmanager
def vllm_engine(model: Path, logs: Path) -> Iterator[Contestant]:
    """A real vLLM, started as `ratchet up` starts it."""
    settings = Settings(engine_port=free_port())
    command = engine_command(settings, model)
    with _running("vllm", command, logs, engine_environment(settings, model)) as process:
        _wait_for(f"http://127.0.0.1:{settings.engine_port}/health", process, logs / "vllm.log")
        yield _direct("vllm", settings.engine_port, {"engine": psutil.Process(process.pid)})


def _direct(name: str, port: int, processes: dict[str, psutil.Process]) -> Contestant:
    return Contestant(name, Address("127.0.0.1", port), "/v1/chat/completions", BASE, processes)


@contextmanager
def ratchet(engine: Contestant, state: Path) -> Iterator[Contestant]:
    """The service on a new embedded PostgreSQL in `state`, as `ratchet up` starts the two; no trainer."""
    url = f"http://{engine.address.host}:{engine.address.port}"
    settings = Settings(state=state, port=free_port(), database_port=free_port(), engine_urls=(url,))
    environment = {
        "RATCHET_STATE": str(state),
        "RATCHET_PORT": str(settings.port),
        "RATCHET_DATABASE_PORT": str(settings.database_port),
        "RATCHET_ENGINE_URLS": json.dumps([url]),
    }
    with (
        _database(settings) as postgres,
        _running("service", [sys.executable, "-m", "service"], state, environment) as service,
    ):
        _wait_for(f"http://127.0.0.1:{settings.port}/readyz", service, state / "service.log")
        num_stored = partial(_num_stored, settings)
        processes = {"service": psutil.Process(service.pid), "postgres": postgres}
        address = Address("127.0.0.1", settings.port)
        yield Contestant("Ratchet", address, "/v1/chat/completions", "ratchet", processes, num_stored)


def _num_stored(settings: Settings) -> int:
    """Replies in the database that have ended by themselves."""
    engine = sync_engine(settings)
    query = select(func.count()).where(Reply.finish_reason.in_(("stop", "length")))
    with engine.connect() as connection:
        num = connection.scalar(query)
    engine.dispose()
    return num or 0


@contextmanager
def _database(settings: Settings) -> Iterator[psutil.Process]:
    """The embedded PostgreSQL with all tables and the base as the live policy; fsync is on, as by default."""
    embedded.prepare(settings)
    with _running("postgres", embedded.command(settings), settings.state, folder="/") as server:
        embedded.wait_until_ready(settings, lambda: server.poll() is None)
        schema.upgrade(settings)
        engine = sync_engine(settings)
        with sync_sessions(engine).begin() as session:
            ensure_base(session, "base")
        engine.dispose()
        try:
            yield psutil.Process(server.pid)
        finally:
            embedded.end_leftovers(embedded.data_folder(settings))


@contextmanager
def litellm(engine: Contestant, folder: Path) -> Iterator[Contestant]:
    """LiteLLM's proxy: one model, no database, no callbacks."""
    port = free_port()
    parameters = {
        "model": f"hosted_vllm/{engine.model}",
        "api_base": f"http://{engine.address.host}:{engine.address.port}/v1",
        "api_key": "none",
    }
    config = folder / "litellm.yaml"
    config.write_text(
        json.dumps({"model_list": [{"model_name": PEERS_MODEL, "litellm_params": parameters}]})
    )  # is YAML
    command = [str(PEERS / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1"]
    with _running("litellm", [*command, "--port", str(port)], folder, LITELLM_ENVIRONMENT) as process:
        _wait_for(f"http://127.0.0.1:{port}/health/liveliness", process, folder / "litellm.log")
        gateway = {"gateway": psutil.Process(process.pid)}
        yield Contestant("LiteLLM", Address("127.0.0.1", port), "/v1/chat/completions", PEERS_MODEL, gateway)


@contextmanager
def tensorzero(engine: Contestant, folder: Path) -> Iterator[Contestant]:
    """TensorZero's gateway: one model, observability off."""
    config = folder / "tensorzero.toml"
    config.write_text(
        "[gateway]\nobservability.enabled = false\n"
        f'[models.{PEERS_MODEL}]\nrouting = ["vllm"]\n[models.{PEERS_MODEL}.providers.vllm]\ntype = "vllm"\n'
        f'api_base = "http://{engine.address.host}:{engine.address.port}/v1/"\n'
        f'model_name = "{engine.model}"\napi_key_location = "none"\n'
    )
    launcher = Path(__file__).with_name("gateway_tensorzero.py")
    command = [str(PEERS / "bin" / "python"), str(launcher), str(config)]
    with _running("tensorzero", command, folder) as process:
        port = int(_line_of(re.compile(r"^http://[^:]+:(\d+)/", re.M), process, folder / "tensorzero.log"))
        gateway = {"gateway": psutil.Process(process.pid)}
        model = f"tensorzero::model_name::{PEERS_MODEL}"
        yield Contestant(
            "TensorZero", Address("127.0.0.1", port), "/openai/v1/chat/completions", model, gateway
        )


@contextmanager
def _running(
    name: str,
    command: list[str],
    logs: Path,
    environment: dict[str, str] | None = None,
    folder: str | Path = ROOT,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, with its log in `logs`; its whole session is ended."""
    with (logs / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | (environment or {}),
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except ProcessLookupError:
        pass
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once `url` answers 200."""

    def answers() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    _wait_until(answers, process, log)


def _line_of(pattern: re.Pattern[str], process: subprocess.Popen[bytes], log: Path) -> str:
    """What the pattern's group matches, once it stands in the log."""
    found: list[str] = []

    def is_there() -> bool:
        found.extend(pattern.findall(log.read_text(errors="replace")))
        return bool(found)

    _wait_until(is_there, process, log)
    return found[0]


def _wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises RuntimeError with the end of the log where it does not come true, or the process ends."""
    deadline = time.monotonic() + START_SECONDS
    while not true():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{log.stem} did not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)
