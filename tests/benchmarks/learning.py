"""`make bench-learning`: what is learnt from some hundred noisy votes, by ours and by others. READ FIRST.

Each run: a taste and a seed; its users vote on the starter's replies; each method learns from the same votes with as many
samples; then all answer the same 400 questions, which the taste scores. What a method may not see: the taste, the questions.
Writes Markdown to standard output and every run to `results/learning.json`.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.benchmarks.learning_methods import METHODS, Lesson
from tests.benchmarks.learning_users import Judged, draw_votes, judge
from tests.benchmarks.tables import write_results
from trainer.demo_scores import as_markdown
from trainer.models import Roles
from trainer.tastes import TASTES, find_taste

ROOT = Path(__file__).parents[2]
COLUMNS = (
    "taste",
    "seed",
    "method",
    "win rate",
    "correct: starter -> learnt",
    "KL",
    "repeated",
    "seconds",
    "",
)
SUMMARY = (
    "method",
    "runs",
    "win rate [least]",
    "correct, gain in points [least]",
    "KL",
    "repeated",
    "seconds",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One method's result in one setting. Win rate against the starter; `correct` are shares."""

    taste: str
    seed: int
    method: str
    win_rate: float
    correct_before: float
    correct: float
    kl: float
    spoilt: float
    seconds: float
    remark: str

    @property
    def gain(self) -> float:
        """Of correct answers, in points."""
        return 100 * (self.correct - self.correct_before)


def main() -> None:
    """Run and report."""
    options = _options()
    torch.set_num_threads(options.threads)
    starter = make_starter(options.state)
    runs: list[Run] = []
    print(f"{options.votes} votes, {options.flip:.0%} of them turned round\n")
    print(as_markdown(COLUMNS, []), end="", flush=True)
    for run in _all(options, starter):
        runs.append(run)
        print(as_markdown(COLUMNS, [_row(run)]).splitlines()[-1], flush=True)
    print("\n" + as_markdown(SUMMARY, [_summary(runs, method) for method in options.methods]))
    write_results(
        "learning",
        {"votes": options.votes, "flip": options.flip, "runs": [asdict(run) for run in runs]},
    )


def _all(options: argparse.Namespace, starter: Path) -> Iterator[Run]:
    for taste_name in options.tastes:
        taste = find_taste(taste_name)
        for seed in options.seeds:
            roles = Roles.load(starter, rank=16)
            votes = draw_votes(roles, taste, options.votes, seed, options.flip)
            before = judge(roles, taste, seed)
            for method in options.methods:
                with tempfile.TemporaryDirectory() as folder:
                    lesson = Lesson(starter, votes, taste, seed, Path(folder))
                    began = time.monotonic()
                    after, remark = METHODS[method](lesson)
                    seconds = time.monotonic() - began
                yield _run(taste_name, seed, method, before, after, seconds, remark)


def _run(
    taste: str, seed: int, method: str, before: Judged, after: Judged, seconds: float, remark: str
) -> Run:
    return Run(
        taste=taste,
        seed=seed,
        method=method,
        win_rate=after.beats(before),
        correct_before=before.correct,
        correct=after.correct,
        kl=after.kl,
        spoilt=after.spoilt,
        seconds=seconds,
        remark=remark,
    )


def _row(run: Run) -> list[str]:
    return [
        run.taste,
        str(run.seed),
        run.method,
        f"{run.win_rate:.3f}",
        f"{run.correct_before:.3f} -> {run.correct:.3f}",
        f"{run.kl:.2f}",
        f"{run.spoilt:.4f}",
        f"{run.seconds:.0f}",
        run.remark,
    ]


def _summary(runs: Sequence[Run], method: str) -> list[str]:
    mine = [run for run in runs if run.method == method]
    return [
        method,
        str(len(mine)),
        f"{_mean([run.win_rate for run in mine], 3)} [{min(run.win_rate for run in mine):.3f}]",
        f"{_mean([run.gain for run in mine], 1)} [{min(run.gain for run in mine):+.1f}]",
        f"{statistics.fmean(run.kl for run in mine):.2f}",
        f"{statistics.fmean(run.spoilt for run in mine):.4f}",
        f"{statistics.fmean(run.seconds for run in mine):.0f}",
    ]


def _mean(values: Sequence[float], digits: int) -> str:
    """With twice its standard error."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    error = 2 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def make_starter(state: Path) -> Path:
    """The starter of seed 0, kept."""
    folder = state / "starter"
    command = [sys.executable, "-m", "trainer.starter", "--out", str(folder), "--seed", "0"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What is learnt from some hundred noisy votes.")
    parser.add_argument("--tastes", nargs="+", default=list(TASTES), choices=list(TASTES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--votes", type=int, default=450)
    parser.add_argument("--flip", type=float, default=0.0, help="share of votes that are turned round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--state",
        type=Path,
        default=ROOT / "state" / "bench-learning",
        help="folder of the starter, which is kept",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
