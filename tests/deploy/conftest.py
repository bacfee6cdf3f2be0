"""The tools that deploy/ is tried with. `deploy/setup.sh` brings them; a machine without one fails these tests, and says so."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.conftest import prepared, rows, serve  # noqa: F401  (fixtures)

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
Tool = Callable[..., str]


@pytest.fixture(scope="session")
def promtool() -> Tool:
    """Runs promtool; what it printed. Fails the test where it fails."""
    beside = Path(sys.executable).with_name("promtool")
    found = str(beside) if beside.exists() else shutil.which("promtool")
    assert found, "there is no promtool on this machine: `sh deploy/setup.sh test` fetches it"
    return lambda *words: run([found, *words])


@pytest.fixture(scope="session")
def compose() -> Tool:
    """Runs Docker Compose in the clone's root; what it printed. It needs no daemon for what is asked of it here."""
    plugin = shutil.which("docker") and subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False
    )
    command = ["docker", "compose"] if plugin and plugin.returncode == 0 else ["docker-compose"]
    assert shutil.which(command[0]), "there is no Docker Compose: `sh deploy/setup.sh test` fetches it"
    return lambda *words: run([*command, *words])


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
