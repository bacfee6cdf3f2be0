"""Runs of `learning.py`, and the tables that it shows."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.learning_cycles import Step
from tests.benchmarks.learning_methods import RewardQuality
from tests.benchmarks.learning_users import Judged
from trainer.demo_scores import as_markdown

RUN = (
    "taste",
    "seed",
    "method",
    "win rate",
    "correct: starter -> learnt",
    "KL",
    "repeated or cut off",
    "seconds",
    "",
)
METHOD = (
    "method",
    "runs",
    "win rate [least]",
    "correct, gain in points [least]",
    "KL",
    "repeated or cut off",
    "seconds",
)
REWARD = (
    "reward model",
    "taste",
    "runs",
    "accuracy on fresh votes [least]",
    "ECE [most]",
)
STEP = ("taste", "seed", "cycle", "votes", "taste's score", "win rate", "correct", "")


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

    @staticmethod
    def of(
        taste: str, seed: int, method: str, before: Judged, after: Judged, seconds: float, remark: str
    ) -> "Run":
        """Of the starter's and the policy's replies to the same questions."""
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

    @property
    def gain(self) -> float:
        """Of correct answers, in points."""
        return 100 * (self.correct - self.correct_before)


@dataclass(frozen=True, slots=True)
class RewardRun:
    """One reward model in one setting."""

    taste: str
    seed: int
    method: str
    quality: RewardQuality


def show_run_head() -> None:
    """Of the table whose rows `show_run` prints as they come."""
    print(as_markdown(RUN, []), end="", flush=True)


def show_run(run: Run) -> None:
    """One row."""
    cells = [
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
    print(as_markdown(RUN, [cells]).splitlines()[-1], flush=True)


def show_steps(steps: Sequence[Step]) -> None:
    """Cycles in a row, in one setting."""
    peak = max(step.score for step in steps)
    rows = [
        [
            step.taste,
            str(step.seed),
            str(step.cycle),
            str(step.votes),
            f"{step.score:+.3f}" + (" (peak)" if step.score == peak else ""),
            f"{step.win_rate:.3f}",
            f"{step.correct:.3f}",
            step.remark,
        ]
        for step in steps
    ]
    print(as_markdown(STEP, rows), flush=True)


def method_summary(runs: Sequence[Run]) -> str:
    """A row for each method, with twice the standard error over its runs."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == method]
        rows.append(
            [
                method,
                str(len(mine)),
                f"{_mean([run.win_rate for run in mine], 3)} [{min(run.win_rate for run in mine):.3f}]",
                f"{_mean([run.gain for run in mine], 1)} [{min(run.gain for run in mine):+.1f}]",
                f"{statistics.fmean(run.kl for run in mine):.2f}",
                f"{statistics.fmean(run.spoilt for run in mine):.4f}",
                f"{statistics.fmean(run.seconds for run in mine):.0f}",
            ]
        )
    return as_markdown(METHOD, rows)


def reward_summary(rewards: Sequence[RewardRun]) -> str:
    """A row for each reward model and taste."""
    rows = []
    for method, taste in dict.fromkeys((each.method, each.taste) for each in rewards):
        mine = [each.quality for each in rewards if (each.method, each.taste) == (method, taste)]
        accuracies = [quality.accuracy for quality in mine]
        errors = [quality.calibration_error for quality in mine]
        rows.append(
            [
                method,
                taste,
                str(len(mine)),
                f"{_mean(accuracies, 3)} [{min(accuracies):.3f}]",
                f"{_mean(errors, 3)} [{max(errors):.3f}]",
            ]
        )
    return as_markdown(REWARD, rows)


def _mean(values: Sequence[float], digits: int) -> str:
    """With twice its standard error."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    error = 2 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"
