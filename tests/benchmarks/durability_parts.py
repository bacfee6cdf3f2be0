"""Ratchet's parts on one machine, each started as `ratchet up` starts it, killed at will and started again.

`ratchet up` ends everything when a part ends; on servers systemd or Kubernetes start it again, which is what this stands for.
Used by `durability.py`, and with fewer parts by `tests/service/test_durability.py`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import psycopg

from service import embedded, schema
from service.database import database_url, sync_engine, sync_sessions
from service.engine_process import engine_command, engine_environment
from service.policies import ensure_base
from service.processes import Part, end_session
from service.settings import Settings
from tests.engine import free_port

AGAIN_SECONDS = 0.2
"""Pause before a part that ended is started again."""
LOST_POWER = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
"""What keeps a commit through a power cut. kill -9 cannot show that: the kernel still holds what was written."""


class Supervised:
    """A part that is started again whenever it ends."""

    def __init__(self, part: Part, log: Path, prepare: Callable[[], None] = lambda: None) -> None:
        self.name = part.name
        self.num_starts = 0
        self.num_kills = 0
        self._part = part
        self._log = log
        self._prepare = prepare
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=part.name)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._prepare()
            self._process = self._start()
            self._process.wait()
            end_session(self._process.pid)  # what outlived it would hold its port and its memory
            self._stopping.wait(AGAIN_SECONDS)

    def _start(self) -> "subprocess.Popen[bytes]":
        self.num_starts += 1
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._part.command,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | self._part.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._part.folder,
                start_new_session=True,
            )

    def kill(self, chance: random.Random) -> str:
        """SIGKILL all of it, its first process alone, or one of the others (likelier a large one). Says which."""
        tree = self._tree()
        how = chance.choice(["all", "first", "other"] if len(tree) > 1 else ["all"])
        if how == "other":
            victims = chance.choices(tree[1:], [_memory(process) + 1 for process in tree[1:]])
        else:
            victims = tree if how == "all" else tree[:1]
        for pid in [process.pid for process in victims]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.num_kills += 1
        return how

    def _tree(self) -> list[psutil.Process]:
        """The first process and its descendants, as soon as it runs (it may just be starting again)."""
        while True:
            process = self._process
            if process is not None and process.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    first = psutil.Process(process.pid)
                    return [first, *first.children(recursive=True)]
            time.sleep(0.01)

    def stop(self) -> None:
        """End it for good."""
        self._stopping.set()
        while self._thread.is_alive():
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(self._part.stop_signal)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(self._part.stop_seconds)
                end_session(self._process.pid)
            self._thread.join(0.1)


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def fresh_settings(state: Path, model: Path) -> Settings:
    """Settings on ports that nobody uses."""
    ports = {"port": free_port(), "engine_port": free_port(), "database_port": free_port()}
    return Settings(state=state, model=str(model), **ports)


def environment(settings: Settings) -> dict[str, str]:
    """What a service of these settings needs in its environment."""
    names = ("state", "model", "port", "engine_port", "database_port", "delivery", "watch_share")
    urls = {"RATCHET_ENGINE_URLS": json.dumps(settings.engine_urls)} if settings.engine_urls else {}
    return {f"RATCHET_{name.upper()}": str(getattr(settings, name)) for name in names} | urls


@contextmanager
def running(settings: Settings, names: Sequence[str]) -> Iterator[dict[str, Supervised]]:
    """PostgreSQL with all tables and, of the others, those that are named; all ended when the body is left."""
    settings.state.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Supervised] = {}
    try:
        parts["postgres"] = start_database(settings)
        for name in names:
            part = _engine(settings) if name == "engine" else _service(settings)
            parts[name] = Supervised(part, settings.state / f"{name}.log")
        yield parts
    finally:
        for part in reversed(parts.values()):
            part.stop()
        embedded.end_leftovers(embedded.data_folder(settings))


def _engine(settings: Settings) -> Part:
    model = Path(settings.model)
    return Part("engine", engine_command(settings, model), engine_environment(settings, model))


def _service(settings: Settings) -> Part:
    return Part("service", [sys.executable, "-m", "service"], environment(settings))


def start_database(settings: Settings) -> Supervised:
    """It takes connections, and has all tables with the base as live policy, on return."""
    embedded.prepare(settings)
    part = Part("postgres", embedded.command(settings), stop_signal=signal.SIGINT, folder="/")
    server = Supervised(part, settings.state / "postgres.log", lambda: embedded.prepare(settings))
    try:
        embedded.wait_until_ready(settings, lambda: True)
        schema.upgrade(settings)
        engine = sync_engine(settings)
        with sync_sessions(engine).begin() as session:
            ensure_base(session, settings.model)
        engine.dispose()
        check_commits_last(settings)
    except BaseException:
        server.stop()
        raise
    return server


def check_commits_last(settings: Settings) -> None:
    """Raises AssertionError where PostgreSQL runs with a setting that a power cut would punish."""
    with psycopg.connect(libpq_url(settings)) as connection:
        for name, value in LOST_POWER.items():
            found = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
            assert found == (value,), f"PostgreSQL runs with {name}={found}"


def libpq_url(settings: Settings) -> str:
    """The database, as psycopg and libpq name it."""
    return database_url(settings).set(drivername="postgresql").render_as_string(hide_password=False)


def wait_until_answering(url: str, seconds: float) -> float:
    """Seconds until the address answers 200; infinity where it did not within `seconds`."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return time.monotonic() - began
        time.sleep(0.1)
    return float("inf")
