"""Starting the process: what is wrong ends it with one line that names the setting."""

import os
import subprocess
import sys

import pytest

from service.__main__ import listen
from service.errors import SettingsError
from service.settings import Settings
from tests.engine import free_port


def start(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_database_that_cannot_be_reached_is_one_line() -> None:
    done = start(DATABASE_URL=f"postgresql://me:geheim@127.0.0.1:{free_port()}/x")
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert "DATABASE_URL" in line
    assert "geheim" not in line


@pytest.mark.database
def test_a_database_without_a_live_policy_is_one_line(database: Settings) -> None:
    done = start()
    assert done.returncode == 1
    assert "DATABASE_URL: the database is not prepared" in done.stderr


def test_a_port_in_use_is_named() -> None:
    port = free_port()
    with listen(Settings(port=port)), pytest.raises(SettingsError, match=f"RATCHET_PORT.*{port}.*in use"):
        listen(Settings(port=port))
