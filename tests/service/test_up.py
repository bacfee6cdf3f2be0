"""`ratchet up` as a whole: ready, ended in every way that it can end, and started again with all rows.

How it ends does not depend on what the engine says, so most tests use a stand-in that starts at once (the
trainer's is one too); one test runs the real engine, whose child processes are the hard ones to end.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from service.database import database_url
from service.processes import Record
from service.settings import Settings
from tests.engine import free_port
from tests.tiny_model import make_model

ROOT = Path(__file__).resolve().parents[2]
WAITS_FOREVER = "import time\ntime.sleep(3600)\n"
ENGINE = """
import http.server, json, sys

class Engine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": "policy-000000", "max_model_len": 512}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer({"choices": [{"text": "a"}]})

    def answer(self, body):
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Engine).serve_forever()
"""


class Run:
    """One `ratchet up` on a state folder."""

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

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        url = database_url(self.settings).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def end(self) -> None:
        """Whatever a failed test left."""
        for process in [
            *self.left(),
            *([psutil.Process(self.process.pid)] if self.process.poll() is None else []),
        ]:
            process.kill()
        self.process.wait(10)


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and the stand-ins; the state folder in it is used by one test after the other."""
    home = tmp_path_factory.mktemp("home")
    make_model(home / "model")
    for name, code in {
        "trainers/trainer/__main__.py": WAITS_FOREVER,
        "engines/vllm/entrypoints/openai/api_server.py": ENGINE,
    }.items():
        file = home / name
        file.parent.mkdir(parents=True)
        file.write_text(code)
    for name in (
        "trainers/trainer",
        "engines/vllm",
        "engines/vllm/entrypoints",
        "engines/vllm/entrypoints/openai",
    ):
        (home / name / "__init__.py").touch()  # else the real packages win
    return home


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def start(*, real_engine: bool = False, seconds: float = 60) -> Run:
        engines = [] if real_engine else [home / "engines"]
        runs.append(Run(home, home / "trainers", *engines))
        return runs[-1].wait_until_ready(seconds)

    yield start
    for run in runs:
        run.end()


pytestmark = pytest.mark.database


def end(run: Run, number: signal.Signals) -> None:
    """Ask it to stop, and see that it does."""
    assert len(run.left()) >= 4
    run.process.send_signal(number)
    assert run.process.wait(30) == 0
    assert run.left() == []
    assert "no process is left" in run.output.read_text()


def add_user(run: Run, name: str) -> None:
    run.ask(f"INSERT INTO users (name) VALUES ('{name}')")


def has_user(run: Run, name: str) -> bool:
    return run.ask(f"SELECT count(*) FROM users WHERE name = '{name}'") == [(1,)]


def test_when_a_part_is_killed_all_end_and_the_next_start_has_every_row(start: Start) -> None:
    run = start()
    for part in ("postgres", "engine", "service", "trainer"):
        add_user(run, f"before {part} died")
        os.kill(run.pid(part), signal.SIGKILL)
        assert run.process.wait(30) == 1
        assert run.left() == []
        assert f"{part} was killed by SIGKILL" in run.output.read_text()
        run = start()
        assert has_user(run, f"before {part} died")
        assert run.ask("SELECT live FROM deployment") == [("policy-000000",)]
    end(run, signal.SIGINT)


def test_when_the_runner_is_killed_all_parts_end_at_once_or_at_the_next_start(start: Start) -> None:
    run = start()
    add_user(run, "before the runner died")
    run.process.kill()
    assert run.is_all_gone(30)

    run = start()
    assert has_user(run, "before the runner died")
    old = [psutil.Process(run.pid(name)) for name in ("engine", "service", "postgres")]
    children = psutil.Process(run.process.pid).children()
    guardian = next(child for child in children if "service.guardian" in child.cmdline())
    guardian.kill()
    run.process.kill()
    run.process.wait(10)
    assert all(process.is_running() for process in old)

    run = start()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in old)
    assert "Ended engine, left over" in run.output.read_text()
    end(run, signal.SIGTERM)


def test_a_second_start_on_the_same_state_is_refused_and_the_first_goes_on(start: Start, home: Path) -> None:
    run = start()
    other = Run(home, home / "trainers", home / "engines")
    assert other.process.wait(30) == 2
    assert f"RATCHET_STATE: another `ratchet up` (pid {run.process.pid})" in other.output.read_text()
    with urllib.request.urlopen(f"{run.url}/readyz") as answer:
        assert answer.status == 200
    end(run, signal.SIGHUP)


@pytest.mark.engine
def test_the_real_engine_chats_and_leaves_no_child_when_one_of_them_dies(start: Start) -> None:
    run = start(real_engine=True, seconds=240)
    assert chat(run)["choices"][0]["message"]["content"]
    children = psutil.Process(run.pid("engine")).children(recursive=True)
    core = next(child for child in children if "EngineCore" in " ".join(child.cmdline()))
    core.kill()
    assert run.process.wait(60) == 1
    assert run.left() == []
    assert "engine ended with exit status" in run.output.read_text()


@pytest.mark.engine
def test_the_real_engine_ends_while_it_still_loads(start: Start, home: Path) -> None:
    run = Run(home, home / "trainers")
    try:
        while not (run.settings.state / "run.json").exists() or len(run.parts()) < 3:
            assert run.process.poll() is None, run.output.read_text()
            time.sleep(0.1)
        time.sleep(6)  # into the imports of its children
        run.sessions = {mark.pid for mark in run.parts()}
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(40) == 0
        assert run.left() == []
    finally:
        run.end()


def chat(run: Run) -> Any:
    body = {"model": "ratchet", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    request = urllib.request.Request(
        f"{run.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
