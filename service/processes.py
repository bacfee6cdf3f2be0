"""Starts the parts of one machine, watches them, and ends them so that none is left behind.

Why no ready-made runner: honcho starts all its commands at once (the service needs the database first), hangs
when a process that relays for it is killed, and leaves everything running when it is killed itself;
supervisord does too, and is a daemon driven over RPC. What is needed is small over `subprocess` and psutil:
each part is a session of its own, so that whatever it starts is found by the session's id; `run.json` says which
sessions those are, so that `guardian.py`, or the next start, can end them should this process be killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
from pydantic import BaseModel

from service.errors import RatchetError

POLL_SECONDS = 0.05
KILL_SECONDS = 5.0
LOG_BYTES = 16 << 20
"""A log that has grown past this is moved to `.1` at the next start."""
TAIL_LINES = 10
RECORD = "run.json"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Part:
    """One process to run."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """On top of ours."""
    stop_signal: signal.Signals = signal.SIGTERM
    """Asks for a clean end."""
    stop_seconds: float = 15.0
    """How long a clean end may take; then SIGKILL."""
    folder: str | None = None
    """Working folder; ours where None."""


class Mark(BaseModel):
    """A part that runs: how to end it, and what tells it from a later process with the same pid."""

    name: str
    pid: int
    """Also the id of its session."""
    created: float
    """Seconds since 1970, as psutil gives it."""
    stop_signal: int
    stop_seconds: float


class Record(BaseModel):
    """What `run.json` holds: all that runs now, in the order of starting."""

    boot: str
    """Pids of before a reboot mean nothing."""
    parts: list[Mark]


class PartEnded(RatchetError):
    """A part ended by itself. The message is for the console: which, how, and its last lines."""


class Interrupted(Exception):
    """Somebody asked us to stop."""


class Runner:
    """The parts of one run. Every wait is `wait_for`, which sees dead parts and requests to stop."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._marks: list[Mark] = []
        self._guardian: subprocess.Popen[bytes] | None = None
        self._requests_to_stop = 0

    def request_stop(self) -> None:
        """Ask all waits to end; asked again, the parts are killed at once. Safe in a signal handler."""
        self._requests_to_stop += 1

    def start(self, part: Part) -> None:
        """Start a part, its output going to its log. Raises as `check` does."""
        self.check()
        if self._guardian is None:
            self._guardian = _start_guardian(self._state)
        with _open_log(self._state, part.name) as log:
            process = subprocess.Popen(
                part.command,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=part.folder,
                start_new_session=True,
            )
        self._processes[part.name] = process
        self._marks.append(_mark(part, process.pid))
        _write_record(self._state, self._marks)

    def check(self) -> None:
        """Raises Interrupted on a request to stop, PartEnded where a part has ended, with any status."""
        if self._requests_to_stop:
            raise Interrupted
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise PartEnded(describe_end(name, process.returncode, log_path(self._state, name)))

    def wait_for(self, condition: Callable[[], bool], every_seconds: float = POLL_SECONDS) -> None:
        """Return once `condition` holds. Raises as `check` does."""
        while not condition():
            self.check()
            time.sleep(every_seconds)

    def run(self, command: list[str]) -> int:
        """Run a command to its end, on our console; its exit status. Raises as `check` does."""
        with subprocess.Popen(command, start_new_session=True) as process:
            try:
                self.wait_for(lambda: process.poll() is not None)
            except BaseException:
                end_session(process.pid)
                raise
        return process.returncode

    def stop(self) -> None:
        """End all parts, the last started first, and whatever they started."""
        end_parts(self._marks, is_hurried=lambda: self._requests_to_stop > 1)
        for process in self._processes.values():
            process.wait()
        (self._state / RECORD).unlink(missing_ok=True)
        if self._guardian is not None:
            self._guardian.communicate()
        self._processes, self._marks, self._guardian = {}, [], None


def end_parts(marks: list[Mark], is_hurried: Callable[[], bool] = lambda: False) -> list[str]:
    """Ask one part after the other to end, the last started first, and kill what is left. Names of those that ran."""
    ended = []
    for mark in reversed(marks):
        if _is_reused(mark) or not _members(mark.pid):
            continue
        ended.append(mark.name)
        _signal(mark.pid, mark.stop_signal)
        deadline = time.monotonic() + mark.stop_seconds
        while not _is_gone(mark.pid) and time.monotonic() < deadline and not is_hurried():
            time.sleep(POLL_SECONDS)
        end_session(mark.pid)
    return ended


def end_leftovers(state: Path) -> list[str]:
    """End what a killed run left running; the names of those parts. Does nothing after a reboot."""
    path = state / RECORD
    try:
        text = path.read_text()
        record = Record.model_validate_json(text)
    except (OSError, ValueError):
        return []
    ended = end_parts(record.parts) if record.boot == BOOT_ID.read_text() else []
    if path.exists() and path.read_text() == text:  # else a new run has written its own meanwhile
        path.unlink()
    return ended


def end_session(session: int) -> None:
    """SIGKILL every process of a session. Returns when all are gone."""
    deadline = time.monotonic() + KILL_SECONDS
    while (members := _members(session)) and time.monotonic() < deadline:
        for pid in members:
            _signal(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def log_path(state: Path, name: str) -> Path:
    return state / "logs" / f"{name}.log"


def describe_end(name: str, status: int, log: Path) -> str:
    """Which part ended, how, and the last lines that it wrote."""
    how = (
        f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    )
    try:
        lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError:
        lines = []
    return "\n".join([f"{name} {how}. The end of {log}:", *(f"  {line}" for line in lines)])


def _start_guardian(state: Path) -> "subprocess.Popen[bytes]":
    """The parts do not inherit our end of its pipe, so that it closes with us."""
    command = [sys.executable, "-m", "service.guardian", str(state)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _mark(part: Part, pid: int) -> Mark:
    created = psutil.Process(pid).create_time()
    return Mark(
        name=part.name,
        pid=pid,
        created=created,
        stop_signal=part.stop_signal,
        stop_seconds=part.stop_seconds,
    )


def _open_log(state: Path, name: str) -> IO[bytes]:
    path = log_path(state, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def _write_record(state: Path, marks: list[Mark]) -> None:
    new = state / f"{RECORD}.new"
    new.write_text(Record(boot=BOOT_ID.read_text(), parts=marks).model_dump_json())
    new.replace(state / RECORD)


def _is_reused(mark: Mark) -> bool:
    """Whether the pid is another process's by now. (A session's id is not given out while a member lives.)"""
    try:
        created: float = psutil.Process(mark.pid).create_time()
    except psutil.NoSuchProcess:
        return False
    return abs(created - mark.created) > 1


def _members(session: int) -> list[int]:
    """The living processes of a session; zombies are nobody's business but their parent's."""
    return [pid for pid in psutil.pids() if _session_of(pid) == session and not _is_gone(pid)]


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _is_gone(pid: int) -> bool:
    try:
        status: str = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return True
    return bool(status == psutil.STATUS_ZOMBIE)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
