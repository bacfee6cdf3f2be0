"""One visit of the PPO benchmark to one contestant: what it is asked to do, and what it says it took.

Each visit is a process of its own (`run`), with the job on its command line and the figures in a file, since trainers write to
standard output as they please. Imported in both environments, so there is nothing here that only one of them has.
"""

import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Job:
    """The same for both contestants."""

    base: str
    """Folder of the model, with `prompts.json`: as many prompts as there are samples, as token ids."""
    samples: int
    """Prompts, with one reply each, of an iteration."""
    minibatch: int
    """Samples in an optimiser step."""
    epochs: int
    reply_tokens: int
    """Of every reply: the model never ends one by itself."""
    iterations: int
    """Measured ones; one more before them warms up."""
    dtype: str
    """Of the frozen weights and of computing: float32 or bfloat16. Ratchet finds out by itself which is faster."""
    rank: int
    """Of the adapter; 0 trains all weights (TRL alone)."""
    layers: float
    """Share of the model's layers, the last ones, that the adapter is on."""

    @property
    def prompts(self) -> list[list[int]]:
        """As token ids."""
        prompts: list[list[int]] = json.loads((Path(self.base) / "prompts.json").read_text())
        return prompts


@dataclass(frozen=True, slots=True)
class Figures:
    """What a visit measured."""

    seconds: list[float]
    """Of each measured iteration."""
    cpu_seconds: list[float]
    """The same, of all threads together: what to compare where others use the machine."""
    idle_mib: float
    """Resident memory with libraries and base model loaded."""
    peak_mib: float
    """The most from then on: trainer, samples, updates."""
    trained: int
    """Parameters that the optimiser moves."""
    dtype: str


class Clock:
    """Told when an iteration has ended. What came before the first tick is not counted: it warms up."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def tick(self) -> None:
        """An iteration has ended."""
        self._wall.append(time.perf_counter())
        self._cpu.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """Between ticks."""
        return self._between(self._wall)

    @property
    def cpu_seconds(self) -> list[float]:
        """The same, of all threads together."""
        return self._between(self._cpu)

    @staticmethod
    def _between(times: list[float]) -> list[float]:
        return [after - before for before, after in itertools.pairwise(times)]


class Memory:
    """Resident memory of this process, from /proc (proc(5)). Made when the base model is loaded."""

    def __init__(self) -> None:
        gc.collect()
        self.idle_mib = self._mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # count the peak from now on

    @property
    def peak_mib(self) -> float:
        """Since this was made."""
        return self._mib("VmHWM")

    @staticmethod
    def _mib(name: str) -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) / 1024


def answer(work: Callable[[Job], Figures]) -> None:
    """The other side of `run`: do the job of the command line."""
    job, out = sys.argv[1:]
    Path(out).write_text(json.dumps(asdict(work(Job(**json.loads(job))))))


def run(python: Path, module: str, job: Job) -> Figures:
    """Raises RuntimeError with the end of what it wrote where the visit failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [str(python), "-m", module, json.dumps(asdict(job)), str(out)]
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{module} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return Figures(**json.loads(out.read_text()))
