"""One `ratchet up`: its processes, its database, its output. Used by `test_up.py` and `test_running_loop.py`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import psycopg

from service.database import database_url
from service.processes import Record
from service.settings import Settings
from tests.engine import free_port

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """Started on a folder with a `model`, whose `state` it uses. stand_ins: folders of modules that take the place of real ones."""

    def __init__(self, folder: Path, *stand_ins: Path) -> None:
        self.settings = Settings(
            state=folder / "state", port=free_port(), engine_port=free_port(), database_port=free_port()
        )
        self.output = folder / "output"
        environment = {
            **os.environ,
            "PYTHONPATH": ":".join(str(path) for path in [*stand_ins, ROOT]),
            "RATCHET_MODEL": str(folder / "model"),
            "RATCHET_STATE": str(self.settings.state),
            "RATCHET_PORT": str(self.settings.port),
            "RATCHET_ENGINE_PORT": str(self.settings.engine_port),
            "RATCHET_DATABASE_PORT": str(self.settings.database_port),
        }
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "up"],
                cwd=folder,  # not the clone, where `trainer` would be the real one
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Tests that are run under nohup would have it ignore a hang-up, as it should.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )
        self.sessions: set[int] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    def wait_until_ready(self, seconds: float) -> "Run":
        deadline = time.monotonic() + seconds
        while "Ready after" not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)
        self.sessions = {mark.pid for mark in self.parts()}
        return self

    def parts(self) -> list[Any]:
        return list(Record.model_validate_json((self.settings.state / "run.json").read_bytes()).parts)

    def pid(self, part: str) -> int:
        return int(next(mark.pid for mark in self.parts() if mark.name == part))

    def left(self) -> list[psutil.Process]:
        """The living processes of this run: of its sessions, or (PostgreSQL's backends) in its folders."""
        return [each for each in psutil.process_iter() if self.is_ours(each)]

    def is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            ours = os.getsid(process.pid) in self.sessions
            return ours or process.cwd().startswith(str(self.settings.state))
        except (psutil.Error, ProcessLookupError):
            return False

    def is_all_gone(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.left()

    def ask(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        url = database_url(self.settings).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url) as connection:
            cursor = connection.execute(query.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def end(self) -> None:
        """Whatever a failed test left."""
        for process in [
            *self.left(),
            *([psutil.Process(self.process.pid)] if self.process.poll() is None else []),
        ]:
            process.kill()
        self.process.wait(10)
