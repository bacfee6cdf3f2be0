"""A trainer that is killed, at whatever moment, and started again ends with the policy that it would have ended with."""

import math
import multiprocessing
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.tiny_model import make_family
from tests.trainer.tiny_cycle import NAME, policies_in, run_trainer

KILLS = 10
# Processes are forked from one that has paid for the imports and has no threads, which the tests' own may have.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.trainer.tiny_cycle"])


def train(base: Path, folder: Path, cpu_seconds: float = math.inf) -> tuple[int | None, float]:
    """A process that is killed when it has used so much. Returns its exit code and what it used.

    Not seconds of the clock, in which a run takes now longer and now less, with what else the machine does.
    """
    process = PROCESSES.Process(target=run_trainer, args=(base, folder))
    process.start()
    used = 0.0
    with suppress(psutil.NoSuchProcess):  # it has ended
        clock = psutil.Process(process.pid)
        while process.is_alive() and used < cpu_seconds:
            time.sleep(0.005)
            times = clock.cpu_times()
            used = times.user + times.system
    process.kill()
    process.join()
    return process.exitcode, used


def read(folder: Path) -> dict[str, bytes]:
    """Every file of the published policy."""
    return {path.name: path.read_bytes() for path in (policies_in(folder) / NAME).iterdir()}


def test_a_trainer_killed_at_any_moment_ends_with_the_same_policy(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    whole = tmp_path / "whole"
    exit_code, cpu_seconds = train(base, whole)
    assert exit_code == 0
    rng = random.Random(0)
    exit_codes, stages = list[int | None](), set[int]()
    for number in range(KILLS):
        folder = tmp_path / str(number)
        moment = (number + rng.random()) / KILLS * cpu_seconds  # random, but from the beginning to the end
        exit_codes.append(train(base, folder, moment)[0])
        stages.add(len(list((folder / "checkpoints").glob("*.pt"))))
        assert train(base, folder)[0] == 0
        assert read(folder) == read(whole), f"killed after {moment:.2f} of {cpu_seconds:.2f} s"
    assert exit_codes.count(-signal.SIGKILL) >= KILLS - 2, "hardly any was killed before its end"
    assert len(stages) > 2, "all were killed at the same stage"
