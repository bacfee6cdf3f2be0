"""Three ways to change the policy that answers: Ratchet's verified swap, reloading in place, restarting. Used by `swap.py`."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
from sqlalchemy import text

from service.database import sync_engine, sync_sessions
from service.engine_process import STOP_SECONDS, engine_command, engine_environment
from service.policies import BASE, CHANNEL
from service.processes import Part
from service.settings import Settings
from service.tables import Deployment, Policy
from tests.benchmarks.durability_parts import Supervised, wait_until_answering
from tests.benchmarks.swap_replies import Swap

START_SECONDS = 180.0
VERIFY_SECONDS = 60.0
POLL_SECONDS = 0.1


class Operator:
    """Whoever runs Ratchet: publishes policies as the trainer does, lets them go live, and takes them back."""

    def __init__(self, settings: Settings, policies: Sequence[Path], http: aiohttp.ClientSession) -> None:
        self._sessions = sync_sessions(sync_engine(settings))
        self._policies = iter(policies)
        self._http = http

    async def propose(self) -> str:
        """The next policy is published; the service goes on from there. Returns its name."""
        policy = next(self._policies)
        await asyncio.to_thread(self._publish, policy)
        return policy.name

    async def promote(self) -> Swap:
        """The next policy goes live: published, loaded and verified by the service, then called live."""
        old = await self._live()
        began = perf_counter()
        name = await self.propose()
        while perf_counter() - began < VERIFY_SECONDS:
            called = perf_counter()
            status, answer = await self._call("/operator/promote")
            if status == 200:
                return Swap("promotion", old, answer["live"], began, called, perf_counter())
            await asyncio.sleep(POLL_SECONDS)  # it is not verified yet
        raise RuntimeError(f"{name} did not go live: {answer}")

    async def roll_back(self) -> Swap:
        """Live and previous policy change places."""
        old = await self._live()
        called = perf_counter()
        status, answer = await self._call("/operator/rollback")
        if status != 200:
            raise RuntimeError(f"the rollback failed: {answer}")
        return Swap("rollback", old, answer["live"], called, called, perf_counter())

    def _publish(self, policy: Path) -> None:
        with self._sessions.begin() as session:
            session.add(
                Policy(name=policy.name, parent=BASE, path=str(policy), state="published", manifest={})
            )
            session.flush()
            session.get_one(Deployment, 1).challenger = policy.name
            session.execute(text(f"NOTIFY {CHANNEL}"))

    async def _live(self) -> str:
        async with self._http.get("/operator/deployment") as response:
            return str((await response.json())["live"])

    async def _call(self, path: str) -> tuple[int, Any]:
        async with self._http.post(path) as response:
            return response.status, await response.json()


class Engine:
    """One vLLM at a time, started as `ratchet up` starts it, and all that has to do with its weights.

    Two additions: log-probabilities name tokens by their ids, as texts do not tell them apart, and the routes that change weights
    in place are there.
    """

    def __init__(self, settings: Settings) -> None:
        self.url = f"http://127.0.0.1:{settings.engine_port}"
        self._settings = settings
        self._process: Supervised | None = None

    def start(self, model: Path) -> None:
        """Return once it answers. Raises RuntimeError."""
        command = [*engine_command(self._settings, model), "--return-tokens-as-token-ids"]
        environment = engine_environment(self._settings, model) | {"VLLM_SERVER_DEV_MODE": "1"}
        part = Part("engine", command, environment, stop_seconds=STOP_SECONDS)
        self._settings.state.mkdir(parents=True, exist_ok=True)
        log = self._settings.state / "engine.log"
        self._process = Supervised(part, log)
        if wait_until_answering(f"{self.url}/health", START_SECONDS) == float("inf"):
            raise RuntimeError("vLLM did not start:\n" + log.read_text(errors="replace")[-3000:])

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    async def reload(self, mode: str, model: Path, old: str) -> Swap:
        """Pause, put the model's weights in the place of the old ones, and go on. mode: what pausing does to replies under way."""
        async with aiohttp.ClientSession(self.url) as http:
            called = perf_counter()
            for path, body in (
                (f"/pause?mode={mode}", None),
                ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}),
                ("/resume", None),
            ):
                async with http.post(path, json=body) as response:
                    if response.status != 200:
                        raise RuntimeError(f"{path}: {response.status} {await response.text()}")
            return Swap(f"reload, {mode}", old, model.name, called, called, perf_counter())

    async def restart(self, model: Path, old: str) -> Swap:
        """End it, and start it with another model."""
        called = perf_counter()
        await asyncio.to_thread(self.stop)
        await asyncio.to_thread(self.start, model)
        return Swap("restart", old, model.name, called, called, perf_counter())


@contextmanager
def running_engine(settings: Settings, model: Path) -> Iterator[Engine]:
    """An engine that answers with the model; whatever runs in its place is ended with the body."""
    engine = Engine(settings)
    try:
        engine.start(model)
        yield engine
    finally:
        engine.stop()
