"""Parts are started, watched and ended, with everything that they started themselves."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.processes import Interrupted, Mark, Part, PartEnded, Record, Runner, end_leftovers, log_path

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""


def python(name: str, code: str, **more: float) -> Part:
    return Part(name, [sys.executable, "-c", code], **more)  # type: ignore[arg-type]


def printed(state: Path, name: str) -> str:
    """A part's first line, once it is whole: an unbuffered Python writes each of its words by itself."""
    deadline = time.monotonic() + 60
    while "\n" not in (text := log_path(state, name).read_text()):
        assert time.monotonic() < deadline, f"{name} printed no line in time, but {text!r}"
        time.sleep(0.02)
    return text


def is_gone(pid: int) -> bool:
    """Within the moment that the kernel needs."""
    for _ in range(600):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path)
    yield runner
    runner.stop()


def test_stopping_ends_a_part_and_what_it_started(runner: Runner, tmp_path: Path) -> None:
    runner.start(python("family", FAMILY))
    child = int(printed(tmp_path, "family").split()[1])
    runner.stop()
    assert is_gone(child)
    assert not (tmp_path / "run.json").exists()


def test_a_part_that_ignores_the_request_is_killed_in_its_time(runner: Runner, tmp_path: Path) -> None:
    runner.start(python("stubborn", STUBBORN, stop_seconds=0.3))
    printed(tmp_path, "stubborn")
    began = time.monotonic()
    runner.stop()
    assert 0.3 <= time.monotonic() - began < 12  # unless told it would be 15


def test_a_second_request_to_stop_does_not_wait(runner: Runner, tmp_path: Path) -> None:
    runner.start(python("stubborn", STUBBORN, stop_seconds=600))
    printed(tmp_path, "stubborn")
    runner.request_stop()
    runner.request_stop()
    began = time.monotonic()
    runner.stop()
    assert time.monotonic() - began < 300


@pytest.mark.parametrize(
    ("code", "how"),
    [("print('bye')", "exit status 0"), ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL")],
)
def test_any_end_of_a_part_is_told_with_its_last_lines(runner: Runner, code: str, how: str) -> None:
    runner.start(python("brief", f"print('a last line', flush=True)\n{code}"))
    with pytest.raises(PartEnded, match=rf"(?s)brief .*{how}.*a last line"):
        runner.wait_for(lambda: False)


def test_a_wait_ends_on_a_request_to_stop(runner: Runner) -> None:
    runner.request_stop()
    with pytest.raises(Interrupted):
        runner.wait_for(lambda: False)


def test_parts_end_when_whoever_runs_them_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from service.processes import Part, Runner
runner = Runner(Path({str(tmp_path)!r}))
runner.start(Part("part", [sys.executable, "-c", {FAMILY!r}]))
print("started", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        runner.stdout.readline()
        [mark] = Record.model_validate_json((tmp_path / "run.json").read_bytes()).parts
        child = int(printed(tmp_path, "part").split()[1])
        runner.kill()
    assert is_gone(mark.pid)
    assert is_gone(child)


@pytest.fixture
def leftover() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    ) as process:
        yield process
        process.kill()


def record(state: Path, pid: int, created: float, boot: str | None = None) -> None:
    boot = boot or Path("/proc/sys/kernel/random/boot_id").read_text()
    marks = [Mark(name="engine", pid=pid, created=created, stop_signal=signal.SIGTERM, stop_seconds=1)]
    (state / "run.json").write_text(Record(boot=boot, parts=marks).model_dump_json())


def test_the_next_start_ends_what_a_killed_run_left(
    tmp_path: Path, leftover: "subprocess.Popen[bytes]"
) -> None:
    record(tmp_path, leftover.pid, psutil.Process(leftover.pid).create_time())
    assert end_leftovers(tmp_path) == ["engine"]
    assert leftover.wait(30) == -signal.SIGTERM
    assert end_leftovers(tmp_path) == []


def test_a_process_that_only_has_the_pid_of_an_old_part_is_left_alone(
    tmp_path: Path, leftover: "subprocess.Popen[bytes]"
) -> None:
    record(tmp_path, leftover.pid, psutil.Process(leftover.pid).create_time() - 100)
    assert end_leftovers(tmp_path) == []
    assert leftover.poll() is None


def test_nothing_is_ended_on_the_word_of_a_record_from_before_a_reboot(
    tmp_path: Path, leftover: "subprocess.Popen[bytes]"
) -> None:
    record(tmp_path, leftover.pid, psutil.Process(leftover.pid).create_time(), boot="another")
    assert end_leftovers(tmp_path) == []
    assert leftover.poll() is None


def test_a_damaged_record_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    assert end_leftovers(tmp_path) == []


def test_a_log_that_has_grown_is_set_aside(runner: Runner, tmp_path: Path) -> None:
    log = log_path(tmp_path, "part")
    log.parent.mkdir()
    log.write_bytes(bytes(17 << 20))
    runner.start(python("part", "import time; time.sleep(600)"))
    assert log.stat().st_size == 0
    assert log.with_suffix(".log.1").stat().st_size == 17 << 20
