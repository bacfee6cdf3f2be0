"""`make bench-ppo`: our PPO beside TRL's, and beside the arithmetic that neither can do without. READ FIRST.

Random weights, made here. A round visits both contestants with each model, each visit a process of its own, in an order that
turns around from round to round. Writes Markdown to standard output, and all figures as JSON to `results/`.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch

from tests.benchmarks.gateway import Others, processor, revision
from tests.benchmarks.gateway_report import goals_report
from tests.benchmarks.ppo_model import SIZES, Size, count_floor, make_base, measure_matrix_rate
from tests.benchmarks.ppo_report import DIFFERENCES, Contest, contest_goals, contest_report
from tests.benchmarks.ppo_visit import ROOT, Job, run
from tests.benchmarks.tables import write_results
from trainer.models import compute_dtype

OURS = Path(sys.executable), "tests.benchmarks.ppo_ours"
TRL = ROOT / ".venv-trl" / "bin" / "python", "tests.benchmarks.ppo_trl"


def main() -> None:
    """Measure and report."""
    options = _options()
    others = Others()
    with _contests(options) as contests:
        for number in range(options.rounds):
            for contest in contests:
                _visit(contest, options, number)
        print(f"## PPO\n\n{_machine()}")
        for contest in contests:
            print(f"\n{contest_report(contest)}")
    goals = [goal for contest in contests for goal in contest_goals(contest)]
    share = f"- {others.share():.0%} of all cores' time went to processes outside this benchmark"
    print(f"\n{DIFFERENCES.format(epochs=options.epochs)}\n\n{goals_report(goals)}\n\n{share}")
    write_results("ppo", {"contests": [asdict(contest) for contest in contests], "others": others.share()})


@contextmanager
def _contests(options: argparse.Namespace) -> Iterator[list[Contest]]:
    with tempfile.TemporaryDirectory() as folder:
        sizes = [size for size in SIZES if options.size in ("all", size.name.split()[0])]
        yield [_prepare(size, Path(folder) / size.name, options) for size in sizes]


def _prepare(size: Size, folder: Path, options: argparse.Namespace) -> Contest:
    """Write the model and its prompts."""
    samples = options.samples or size.samples
    minibatch = min(size.minibatch, samples)
    if samples % minibatch:
        raise SystemExit(f"--samples must be a multiple of {minibatch}: TRL knows no smaller last minibatch.")
    model = make_base(folder, size.recipe, samples)
    job = Job(
        base=str(folder),
        samples=samples,
        minibatch=minibatch,
        epochs=options.epochs,
        reply_tokens=options.reply_tokens,
        iterations=options.iterations,
        dtype=options.trl_dtype or str(compute_dtype(torch.device("cpu"))).removeprefix("torch."),
        rank=options.rank,
        layers=options.layers,
    )
    prompt_tokens = sum(map(len, job.prompts)) / samples
    floor = count_floor(size.recipe, prompt_tokens, job.reply_tokens, job.epochs, job.layers)
    return Contest(size.name, model.num_parameters(), job, size.recipe.layers, floor)


def _visit(contest: Contest, options: argparse.Namespace, number: int) -> None:
    """Both contestants and the machine, once."""
    contest.matrix_rates.append(measure_matrix_rate())
    theirs = replace(contest.job, rank=0) if options.trl_full else contest.job
    visits = [(contest.ours, OURS, contest.job), (contest.theirs, TRL, theirs)]
    for figures, (python, module), job in visits[:: -1 if number % 2 else 1]:
        figures.append(run(python, module, job))
        line = f"round {number + 1}, {contest.name}, {module.rpartition('_')[2]}: {contest.speed(figures[-1]):.1f} samples/s"
        print(line, file=sys.stderr, flush=True)


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return "\n".join(
        [
            f"- machine: {processor()}, {psutil.cpu_count()} cores, {memory:.0f} GiB; {torch.get_num_threads()} threads",
            f"- Ratchet: {revision()}; torch {torch.__version__}",
        ]
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure our PPO beside TRL's.")
    parser.add_argument("--rounds", type=int, default=3, help="visits to each contestant with each model")
    parser.add_argument("--size", choices=("all", *(size.name.split()[0] for size in SIZES)), default="all")
    parser.add_argument("--samples", type=int, help="of an iteration; by default what the size says")
    parser.add_argument(
        "--iterations", type=int, default=3, help="measured in a visit, after one to warm up: their median"
    )
    parser.add_argument("--epochs", type=int, default=3, help="passes over an iteration's samples")
    parser.add_argument("--reply-tokens", type=int, default=40, help="of every reply")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument(
        "--layers", type=float, default=0.5, help="share of the layers, the last ones, that the adapter is on"
    )
    parser.add_argument("--trl-full", action="store_true", help="have TRL train all weights, not an adapter")
    parser.add_argument("--trl-dtype", choices=("float32", "bfloat16"), help="by default as Ratchet chooses")
    return parser.parse_args()


if __name__ == "__main__":
    main()
