"""A trainer that is killed, at whatever moment, and started again ends with the policy that it would have ended with."""

import multiprocessing
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from service.settings import Tuning
from tests.tiny_model import make_family
from tests.trainer.tiny_cycle import NAME, checkpoints_in, policies_in, run_trainer

KILLS = 10
ITERATIONS = 4
# Processes are forked from one that has paid for the imports and has no threads, which the tests' own may have.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.trainer.tiny_cycle"])

Moment = tuple[int, float]
"""How many checkpoints there are, and the CPU seconds since the last came: in these a busy machine hardly shifts it."""
NEVER = (ITERATIONS + 2, 0.0)


def train(
    base: Path, folder: Path, tuning: Tuning, killed_at: Moment = NEVER
) -> tuple[int | None, list[Moment]]:
    """A process that is killed at a moment. Returns its exit code, and the moments that it was seen at, some ms apart."""
    process = PROCESSES.Process(target=run_trainer, args=(base, folder, ITERATIONS, tuning))
    process.start()
    seen, came = [(0, 0.0)], 0.0
    with suppress(psutil.NoSuchProcess):  # it has ended
        clock = psutil.Process(process.pid)
        while process.is_alive() and seen[-1] < killed_at:
            time.sleep(0.005)
            times = clock.cpu_times()
            used = times.user + times.system
            num_checkpoints = len(list(checkpoints_in(folder).glob("*.pt")))
            if num_checkpoints > seen[-1][0]:
                came = used
            seen.append((num_checkpoints, used - came))
    process.kill()
    process.join()
    return process.exitcode, seen


def read(folder: Path) -> dict[str, bytes]:
    """Every file of the published policy."""
    published = policies_in(folder) / NAME
    files = [path for path in published.rglob("*") if path.is_file()]
    return {str(path.relative_to(published)): path.read_bytes() for path in files}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_trainer_killed_at_any_moment_ends_with_the_same_policy(tuning: Tuning, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    whole = tmp_path / "whole"
    exit_code, moments = train(base, whole, tuning)
    assert exit_code == 0
    rng = random.Random(0)
    exit_codes, reached = list[int | None](), set[int]()
    for number in range(KILLS):
        folder = tmp_path / str(number)
        moment = moments[int((number + rng.random()) / KILLS * len(moments))]  # from the beginning to the end
        exit_code, seen = train(base, folder, tuning, moment)
        exit_codes.append(exit_code)
        reached.add(seen[-1][0])
        assert train(base, folder, tuning)[0] == 0
        assert read(folder) == read(whole), f"killed at {moment}"
    assert exit_codes.count(-signal.SIGKILL) >= KILLS - 2, "hardly any was killed before its end"
    assert len(reached) > 2, "hardly any was killed in PPO"
