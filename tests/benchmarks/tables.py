"""What benchmarks have in common at their end: a table for people, and JSON under `results/`, which git ignores."""

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def print_columns(results: Sequence[dict[str, Any]], key: str) -> None:
    """A column for each result, named by its `key`, and a row for each figure; lists are left to the JSON."""
    table = Table(key, *(str(result[key]) for result in results))
    for name in [name for name, value in results[0].items() if name != key and not isinstance(value, list)]:
        table.add_row(name, *(_shown(result[name]) for result in results))
    Console(highlight=False).print(table)


def print_rows(results: Sequence[dict[str, Any]]) -> None:
    """A row for each result."""
    table = Table(*results[0])
    for result in results:
        table.add_row(*map(_shown, result.values()))
    Console(highlight=False, width=200).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return "never" if value is None else str(value)


def write_results(name: str, figures: dict[str, Any]) -> None:
    """Write `results/NAME.json`, with when and on what machine."""
    machine: dict[str, Any] = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    # Minutes 1, 5 and 15: well above what the benchmark itself asks for, others were using the machine.
    machine["load"] = os.getloadavg()
    content = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **machine, **figures}
    RESULTS.mkdir(exist_ok=True)
    # Sets are written as sorted lists.
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2, default=sorted) + "\n")
