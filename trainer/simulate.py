"""`make demo`: simulated users chat and vote against a running loop, and the terminal shows it learn.

Per seed: a fresh loop; the starter is evaluated; then, cycle by cycle, the users vote, the loop trains while
some of them go on chatting, and what it promoted is evaluated on the same questions. In the end, a table. The loop
sees nothing of the taste but votes. What the users met (failed requests, answers of two policies) is counted, and
makes the exit status; how well the loop learnt does not.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from service.errors import SettingsError
from service.processes import PartEnded
from service.settings import Settings, get_settings
from trainer.demo_client import DemoError, Tally
from trainer.demo_loop import Loop, build_starter, demo_folder, own_loop
from trainer.demo_run import Plan, play
from trainer.demo_scores import (
    POLICY_COLUMNS,
    SEED_COLUMNS,
    Rejected,
    SeedResult,
    as_markdown,
    as_table,
    policy_rows,
    seed_rows,
)
from trainer.demo_screen import Screen
from trainer.tastes import find_taste

LOG_COLUMNS = 140
"""Width of the tables where there is no terminal."""


def run_seeds(
    plan: Plan, seeds: Sequence[int], url: str | None, settings: Settings, tally: Tally, console: Console
) -> Iterator[SeedResult]:
    """Each seed on a fresh loop, or on the one at `url`; prints each one's table. Raises as `SeedRun.play`."""
    screen = Screen(console)
    with demo_folder(settings) as demo:
        model = None
        if url is None:
            screen.say("starter model: made first where it is not there yet")
            model = build_starter(settings, demo)
        for seed in seeds:
            began = time.monotonic()
            screen.say(f"seed {seed}, taste {plan.taste_name}")
            if model is None:
                assert url is not None
                screen.say(f"  Using the loop at {url}: these users' votes stay in its database.")
                rows = asyncio.run(play(plan, seed, Loop(url, lambda: None), tally, screen))
            else:
                name = f"{_file_name(plan.taste_name)}-{seed}"
                with own_loop(demo, name, model, seed=seed, cycle_votes=plan.votes_per_cycle) as loop:
                    screen.say(f"  loop ready at {loop.url} after {time.monotonic() - began:.0f} s")
                    rows = asyncio.run(play(plan, seed, loop, tally, screen))
            minutes = (time.monotonic() - began) / 60
            result = SeedResult(seed, plan.votes_per_cycle * plan.num_cycles, rows, minutes)
            console.print(as_table(f"seed {seed}", POLICY_COLUMNS, policy_rows(result)))
            yield result


def write_markdown(path: Path, plan: Plan, results: Sequence[SeedResult]) -> None:
    """The tables of all seeds so far, for a page."""
    parts = [f"Taste `{plan.taste_name}`, {plan.num_questions} questions to each policy.\n"]
    parts.append(as_markdown(SEED_COLUMNS, seed_rows(results)))
    for result in results:
        parts.append(f"Seed {result.seed}:\n\n{as_markdown(POLICY_COLUMNS, policy_rows(result))}")
    path.write_text("\n".join(parts))


def report(tally: Tally, screen: Screen) -> None:
    """What the users met, in some lines."""
    swaps = ", ".join(map(str, tally.in_flight_at_swaps)) or "no swap"
    screen.say(
        f"{tally.requests} requests, {len(tally.failures)} failed, {len(tally.mixed)} answered by two policies; "
        f"in flight at each swap: {swaps}"
    )
    for kind, lines in (("failed", tally.failures), ("two policies", tally.mixed)):
        for line in lines[:5]:
            screen.say(f"  {kind}: {line}")


def _file_name(taste_name: str) -> str:
    return taste_name.replace(":", "-").replace("/", "-")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.simulate", description="Simulated users chat and vote; watch the loop learn."
    )
    parser.add_argument("--taste", default="warm", help="warm, brief, thorough, or module:function")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each")
    parser.add_argument("--votes", type=int, default=480, help="votes in a run")
    parser.add_argument("--cycles", type=int, default=2, help="training cycles in a run")
    parser.add_argument(
        "--evaluate",
        type=int,
        default=2000,
        help="questions that each policy is scored on: one answer in a thousand is what repeated ones are counted in",
    )
    parser.add_argument(
        "--url", help="use the loop that runs there, with its database, instead of fresh ones"
    )
    arguments = parser.parse_args()
    if arguments.cycles < 1 or arguments.votes < 2 * arguments.cycles or arguments.evaluate < 1:
        parser.error("--cycles and --evaluate must be at least 1, --votes at least two a cycle")
    try:
        find_taste(arguments.taste)
    except (ValueError, ImportError, AttributeError) as error:
        parser.error(str(error))
    return arguments


def demo(arguments: argparse.Namespace, console: Console) -> int:
    """Run all seeds. Returns the exit status: 0 where no request failed and none was of two policies."""
    tally, screen = Tally(), Screen(console)
    plan = Plan(
        arguments.taste,
        find_taste(arguments.taste),
        arguments.votes,
        arguments.cycles,
        arguments.evaluate,
        asks_for_cycles=arguments.url is not None,
    )
    results: list[SeedResult] = []
    status = 1
    try:
        for result in run_seeds(plan, arguments.seeds, arguments.url, get_settings(), tally, console):
            results.append(result)
            path = get_settings().state / "demo" / f"{_file_name(plan.taste_name)}.md"
            write_markdown(path, plan, results)
        failed = any(
            isinstance(row, Rejected) and row.stage == "failed" for each in results for row in each.rows
        )
        status = 0 if tally.is_clean and not failed else 1
    except* (DemoError, PartEnded, SettingsError) as faults:
        print(f"demo: {_first(faults)}", file=sys.stderr)
    if len(results) > 1:
        console.print(as_table("all seeds", SEED_COLUMNS, seed_rows(results)))
    gains = [each.gain for result in results for each in result.scores if each.gain is not None]
    falls = sum(each.is_fall for each in gains)
    screen.say(f"{len(gains)} promotions; the taste's score fell by more than its interval in {falls}")
    report(tally, screen)
    return status


def _first(faults: BaseExceptionGroup[BaseException]) -> BaseException:
    first: BaseException = faults
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


def main() -> None:
    """The command line. Ctrl-C, SIGTERM and a closed terminal end the demo's own loop too."""
    arguments = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
        sys.exit(demo(arguments, console))
    print("demo: stopped", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    main()
