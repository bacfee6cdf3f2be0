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


def print_table(results: Sequence[dict[str, Any]], key: str) -> None:
    """One column for each result, named by its `key`, and one row for each figure; lists are left to the JSON."""
    table = Table(key, *(str(result[key]) for result in results))
    for name in [name for name, value in results[0].items() if name != key and not isinstance(value, list)]:
        table.add_row(name, *(_shown(result[name]) for result in results))
    Console(highlight=False).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return "never" if value is None else str(value)


def write_results(name: str, figures: dict[str, Any]) -> None:
    """Write `results/NAME.json`, with when and on what machine."""
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    content = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **machine, **figures}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
