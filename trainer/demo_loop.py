"""A loop of the demo's own: `ratchet up` on free ports and an empty state folder, ended whatever happens.

Used by `simulate.py` where no running loop is named.
"""

import shutil
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from service import preflight
from service.processes import Part, PartEnded, Runner, end_leftovers
from service.settings import Settings

ASK_SECONDS = 0.25
STOP_SECONDS = 90.0
"""How long `ratchet up` may take to end all its parts."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop that is ready."""

    url: str
    check: Callable[[], None]
    """Raises PartEnded where the loop has ended by itself."""


@contextmanager
def demo_folder(settings: Settings) -> Iterator[Path]:
    """The folder of all demos, held by this process. Raises SettingsError where another demo runs."""
    ours = settings.model_copy(update={"state": settings.state.resolve() / "demo"})
    preflight.make_state(ours)
    with preflight.only_run(ours):
        end_leftovers(ours.state)
        yield ours.state


def build_starter(settings: Settings, demo: Path) -> Path:
    """The starter that `ratchet up` uses too; made, with its own progress shown, where it is not there yet."""
    folder = settings.state.resolve() / "starter"
    words = [sys.executable, "-m", "trainer.starter", "--out", str(folder), "--seed", str(settings.seed)]
    if status := Runner(demo).run(words):
        raise PartEnded(f"Making the starter model ended with exit status {status}.")
    return folder


@contextmanager
def own_loop(demo: Path, name: str, model: Path, *, seed: int, cycle_votes: int) -> Iterator[Loop]:
    """Run a fresh loop on `demo/name`, ready when given. Raises PartEnded where it does not start."""
    state = demo / name
    shutil.rmtree(state, ignore_errors=True)
    port, engine_port, database_port = _free_ports(3)
    environment = {
        "RATCHET_STATE": str(state),
        "RATCHET_HOST": "127.0.0.1",
        "RATCHET_PORT": str(port),
        "RATCHET_ENGINE_PORT": str(engine_port),
        "RATCHET_DATABASE_PORT": str(database_port),
        "RATCHET_MODEL": str(model),
        "RATCHET_SEED": str(seed),
        "RATCHET_CYCLE_VOTES": str(cycle_votes),
        "RATCHET_DUEL_VOTES": "0",  # what training makes of the votes is measured, not whether a few more prove it
    }
    # Another loop's database or engines must not be this one's.
    words = [
        "env",
        "-u",
        "DATABASE_URL",
        "-u",
        "RATCHET_ENGINE_URLS",
        sys.executable,
        "-m",
        "service.cli",
        "up",
    ]
    runner = Runner(demo)
    try:
        runner.start(Part(f"up-{name}", words, environment, signal.SIGINT, STOP_SECONDS))
        url = f"http://127.0.0.1:{port}"
        runner.wait_for(lambda: _is_ready(url), ASK_SECONDS)
        yield Loop(url, runner.check)
    finally:
        runner.stop()


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on now, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
