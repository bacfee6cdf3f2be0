"""What the demo shows while it runs: bars, and one live line for a cycle; plain lines where there is no terminal.

Used by `simulate.py`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_SECONDS = 15.0
"""How often at most a line that changes is printed where there is no terminal; a new stage always is."""
PLAIN_PARTS = 4
"""Lines that a bar becomes there."""


class Screen:
    """The terminal, or a log."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """Gives a function to call at each of `total` steps."""
        began, done = time.monotonic(), 0
        columns = (
            TextColumn("  {task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        interactive = self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=not interactive) as progress:
            task = progress.add_task(title, total=total)

            def step() -> None:
                nonlocal done
                done += 1
                progress.advance(task)
                if not interactive and done < total and done % max(1, total // PLAIN_PARTS) == 0:
                    self.say(f"  {title}: {done}/{total}")

            yield step
        self.say(f"  {title}: {done}/{total} in {time.monotonic() - began:.0f} s")

    @contextmanager
    def line(self) -> Iterator[Callable[[str, str], None]]:
        """Gives a function that shows a text; its first argument says which stage the text is of."""
        if self._console.is_terminal:
            with self._console.status("") as status:
                yield lambda stage, text: status.update(text)
        else:
            yield self._plain_line()

    def _plain_line(self) -> Callable[[str, str], None]:
        last_stage, last_text, at = "", "", 0.0

        def show(stage: str, text: str) -> None:
            nonlocal last_stage, last_text, at
            due = stage != last_stage or time.monotonic() - at > PLAIN_SECONDS
            if due and text != last_text:
                last_stage, last_text, at = stage, text, time.monotonic()
                self.say(f"  {text}")

        return show


def describe_cycle(cycle: dict[str, Any]) -> str:
    """A cycle as far as it is, in one line: stage, how sure the reward model is, KL, the held-out judge."""
    metrics = cycle["metrics"]
    progress = metrics.get("progress") or {}
    parts = [f"cycle {cycle['id']}: {cycle['stage'].replace('_', ' ')}"]
    if progress.get("stage") == cycle["stage"] and progress.get("total"):
        parts[0] += f" {progress.get('done', 0)}/{progress['total']}"
    accuracy = (metrics.get("reward_model") or {}).get("accuracy")
    if accuracy:
        parts.append(
            f"reward model right on {accuracy['share']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}] "
            f"of {accuracy['num_pairs']} held-out votes"
        )
    iterations = (metrics.get("training") or {}).get("iterations")
    if iterations:
        last = iterations[-1]
        parts.append(f"KL {last['kl']:.2f} (coefficient {last['kl_coefficient']:.3f})")
        parts.append(f"judge {last['judge']:+.2f} ± {last['judge_error']:.2f}")
    return ", ".join(parts)


def describe_end(cycle: dict[str, Any], seconds: float) -> Sequence[str]:
    """How a cycle ended, in some lines: why, what PPO kept, every check of the gate."""
    metrics = cycle["metrics"]
    policy = f" {cycle['policy']}" if cycle["policy"] else ""
    reason = f": {cycle['reason']}" if cycle["reason"] else ""
    lines = [f"cycle {cycle['id']} {cycle['stage']}{policy} after {seconds:.0f} s{reason}"]
    training = metrics.get("training") or {}
    if training.get("kept") is not None:
        lines.append(
            f"  {training['method'].upper()} kept iteration {training['kept']} of {len(training.get('iterations', []))}: "
            f"{training.get('why')}"
        )
    for check in (metrics.get("gate") or {}).get("checks", []):
        mark = "passed" if check["passed"] else "FAILED"
        lines.append(
            f"  gate: {check['name']} {_number(check['value'])} ({_number(check['threshold'])}) {mark}"
        )
    return lines


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
