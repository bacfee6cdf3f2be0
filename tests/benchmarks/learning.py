"""`make bench-learning`: what is learnt from some hundred noisy votes, by ours and by others. READ FIRST.

Each setting: a taste and a seed; its users vote on the starter's replies; each method learns from the same votes with as many
samples; then all answer the same questions, which the taste scores. What a method may not see: the taste, the questions.
With `--cycles`, ours alone goes on from its own policies. Writes Markdown to standard output, and all runs to `results/`; each as
soon as it has ended, so that `--resume` goes on where it was cut off (as long as neither starter nor methods have changed).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from tests.benchmarks.kept import Kept, Key
from tests.benchmarks.learning_cycles import Step, go_on
from tests.benchmarks.learning_methods import METHODS, RANK, Lesson, RewardQuality, our_reward, trl_reward
from tests.benchmarks.learning_report import (
    RewardRun,
    Run,
    method_summary,
    reward_summary,
    show_run,
    show_run_head,
    show_steps,
)
from tests.benchmarks.learning_users import NUM_QUESTIONS, Judged, SimulatedVote, draw_votes, judge
from tests.benchmarks.tables import RESULTS, write_results
from trainer.models import Roles
from trainer.tastes import TASTES, find_taste

ROOT = Path(__file__).parents[2]
NUM_FRESH = 2000
"""Votes that reward models are compared on."""
APART = 1000
"""Between the seeds of votes to learn from and of fresh ones."""


def main() -> None:
    """Run and report."""
    options = _options()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    starter = make_starter(options.state)
    turned = f", {options.flip:.0%} of them turned round" if options.flip else ""
    print(f"{options.votes} votes{turned}; {NUM_QUESTIONS} questions to each policy\n")
    name = f"{options.name}-cycles" if options.cycles else options.name
    kept = Kept(RESULTS / f"{name}.jsonl", resume=options.resume)
    figures = _cycles(options, starter, kept) if options.cycles else _compare(options, starter, kept)
    asked = {"votes": options.votes, "flip": options.flip}
    told = {name: [asdict(each) for each in several] for name, several in figures.items()}
    write_results(name, asked | told)


def _compare(options: argparse.Namespace, starter: Path, kept: Kept) -> dict[str, Sequence[Run | RewardRun]]:
    """Every method in every setting."""
    runs: list[Run] = []
    rewards: list[RewardRun] = []
    show_run_head()
    for taste, seed in _settings(options):
        with _lesson(starter, taste, seed, options) as lesson:
            rewards += _measure_reward_models(lesson, taste, options.methods, kept)
            for run in _learn(lesson, taste, options.methods, kept):
                show_run(run)
                runs.append(run)
    print(f"\n{method_summary(runs)}\n{reward_summary(rewards)}")
    return {"runs": runs, "rewards": rewards}


def _learn(lesson: Lesson, taste: str, methods: Sequence[str], kept: Kept) -> Iterator[Run]:
    """By each method, in one setting."""

    @cache
    def before() -> Judged:
        return judge(Roles.load(lesson.starter, RANK), lesson.taste, lesson.seed, draw=0)

    def work(method: str) -> Run:
        began = time.monotonic()
        after, remark = METHODS[method](lesson)
        seconds = time.monotonic() - began
        return Run.of(taste, lesson.seed, method, before(), after, seconds, remark)

    for method in methods:
        yield kept.get(_key(lesson, taste, method), Run, partial(work, method))


def _measure_reward_models(
    lesson: Lesson, taste: str, methods: Sequence[str], kept: Kept
) -> Iterator[RewardRun]:
    """On fresh votes, of which none is turned round."""

    @cache
    def fresh() -> list[SimulatedVote]:
        return draw_votes(Roles.load(lesson.starter, RANK), lesson.taste, NUM_FRESH, lesson.seed + APART)

    measures = {"ours": our_reward}
    if any(method.startswith("trl") for method in methods):
        measures["TRL"] = trl_reward
    for name, measure in measures.items():
        key = _key(lesson, taste, "reward model", name)
        quality = kept.get(key, RewardQuality, partial(_measure, measure, lesson, fresh))
        yield RewardRun(taste, lesson.seed, name, quality)


def _measure(
    measure: Callable[[Lesson, list[SimulatedVote]], RewardQuality],
    lesson: Lesson,
    fresh: Callable[[], list[SimulatedVote]],
) -> RewardQuality:
    return measure(lesson, fresh())


def _cycles(options: argparse.Namespace, starter: Path, kept: Kept) -> dict[str, Sequence[Step]]:
    """Ours, several cycles in a row, in every setting."""
    found: list[Step] = []
    for taste, seed in _settings(options):
        with _lesson(starter, taste, seed, options) as lesson:
            key = _key(lesson, taste, options.cycles)
            steps = kept.get(key, list[Step], partial(_go_on, lesson, taste, options.cycles))
        show_steps(steps)
        found += steps
    return {"steps": found}


def _go_on(lesson: Lesson, taste: str, num_cycles: int) -> list[Step]:
    return list(go_on(lesson, taste, num_cycles))


def _key(lesson: Lesson, taste: str, *what: str | int) -> Key:
    return (taste, lesson.seed, len(lesson.votes), lesson.flip, *what)


def _settings(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    for taste in options.tastes:
        for seed in options.seeds:
            yield taste, seed


@contextmanager
def _lesson(starter: Path, taste_name: str, seed: int, options: argparse.Namespace) -> Iterator[Lesson]:
    taste = find_taste(taste_name)
    votes = draw_votes(Roles.load(starter, RANK), taste, options.votes, seed, options.flip)
    with tempfile.TemporaryDirectory() as folder:
        yield Lesson(starter, votes, options.flip, taste, seed, Path(folder))


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
    parser.add_argument(
        "--cycles",
        type=int,
        default=0,
        help="so many cycles of ours in a row, the first on --votes, each later one on 100 more",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true", help="keep the runs of the last time")
    parser.add_argument("--name", default="learning", help="of the file in results/; of cycles NAME-cycles")
    parser.add_argument(
        "--state",
        type=Path,
        default=ROOT / "state" / "bench-learning",
        help="folder of the starter, which is kept",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
