"""`ratchet up` as a whole: ready, ended in every way that it can end, and started again with all rows.

How it ends does not depend on what the engine says, so most tests use a stand-in that starts at once (the
trainer's is one too). The real ones, whose child processes are the hard ones to end: `test_running_loop.py`, and the last test here.
"""

import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.service.running_up import Run
from tests.tiny_model import make_model

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

    def start() -> Run:
        runs.append(Run(home, home / "trainers", home / "engines"))
        return runs[-1].wait_until_ready(300)

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
    run.process.wait(60)
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
