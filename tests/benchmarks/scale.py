"""`make bench-scale`: what the service costs with a million stored replies, compared with a database that is almost empty.

Two services on two databases of one PostgreSQL, asked in turns, many rounds, so that both see the same machine. Then every
statement that the service makes on the large database, for every call of its API, is explained: none may read a large table
from end to end. Then everything is exported, and the service's memory watched. Prints tables; writes `results/scale.json`;
the exit status is 1 where a bound is missed.

    python -m tests.benchmarks.scale [--replies 1000000] [--votes 300000] [--rounds 60]
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg
from pydantic import SecretStr

from service import embedded, schema
from service.database import database_url, sync_engine, sync_sessions
from service.policies import ensure_base
from service.settings import Settings
from tests.benchmarks.durability_parts import libpq_url, wait_until_answering
from tests.benchmarks.scale_exports import MOST_GROWTH_MIB, measure_exports
from tests.benchmarks.scale_load import draw_subjects, measure_latency, measure_removal
from tests.benchmarks.scale_plans import HEAVY, call_everything, read_statements, scans
from tests.benchmarks.scale_rows import fill
from tests.benchmarks.tables import print_rows, write_results
from tests.engine import free_port

EMPTY_REPLIES, EMPTY_VOTES = 1000, 300
"""Enough that each call has something to find, and nothing to search."""
RATIO = 1.5
"""Largest p99 of a vote, in that of the almost empty database."""
NUM_SLOWEST = 15
"""Statements that are shown; the JSON has all."""
PAIRING = {"RATCHET_COMPARISON_RATE": "1", "RATCHET_COMPARISONS_PER_HOUR": "1000000"}
"""`comparison: auto` always asks for the user's cap, and always shows two."""


def main() -> int:
    """Run it. Returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--replies", type=int, default=1_000_000)
    parser.add_argument("--votes", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-scale-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL may run as somebody else
        with _postgres(Path(folder)) as server:
            small = _database(server, "small", EMPTY_REPLIES, EMPTY_VOTES)
            began = time.monotonic()
            large = _database(server, "large", given.replies, given.votes)
            print(f"filled in {time.monotonic() - began:.0f} s")
            return _measure(small, large, given.rounds)


def _measure(small: Settings, large: Settings, rounds: int) -> int:
    url = libpq_url(large)
    figures: dict[str, Any] = {"tables": _sizes(large)}
    services = [(settings, draw_subjects(settings)) for settings in (small, large)]
    before = scans(url)
    with serving(small), serving(large):
        figures["latency"] = asyncio.run(measure_latency(services, rounds))
    plans = large.state / "plans.jsonl"
    with serving(large, str(plans)):
        left_out = call_everything(large)
    figures["rows read end to end"] = scans(url, before)
    statements = read_statements(plans, url)
    figures["statements"] = [asdict(statement) for statement in statements]
    with serving(large) as service:
        figures["exports"] = asyncio.run(measure_exports(large, service.pid))
        figures["removal"] = asyncio.run(measure_removal(large, HEAVY))
    faults = [*_faults(figures), *left_out]
    faults += [f"{fault}: {statement.text[:200]}" for statement in statements for fault in statement.faults]
    return _report(figures, faults)


def _faults(figures: dict[str, Any]) -> list[str]:
    """The bounds that are missed."""
    removal = figures["removal"]
    slow = [row for row in figures["latency"] if "vote" in row["call"] and row["p99 ratio"] > RATIO]
    grown = [row for row in figures["exports"] if row["peak MiB"] - row["MiB before"] > MOST_GROWTH_MIB]
    return [
        *(f"{row['call']}: p99 is {row['p99 ratio']} times that of an empty database" for row in slow),
        *(f"{row['export']}: memory grew to {row['peak MiB']} MiB" for row in grown),
        *([] if removal["votes"] else [f"removing the user who said most: {removal['answer']}"]),
        *(
            f"{rows:,} rows of {table} were read end to end"
            for table, rows in figures["rows read end to end"].items()
        ),
    ]


def _report(figures: dict[str, Any], faults: list[str]) -> int:
    print_rows(figures["tables"])
    print_rows(figures["latency"])
    print_rows([_brief(row) for row in figures["statements"][:NUM_SLOWEST]])
    print(f"{len(figures['statements'])} statements in all")
    if figures["exports"]:
        print_rows(figures["exports"])
    else:
        print("This service has no exports.")
    removal = figures["removal"]
    print(
        f"removing {HEAVY}, {removal['prompts']} prompts and {removal['votes']} votes: {removal['seconds']} s"
    )
    print(*faults or ["Nothing is amiss."], sep="\n")
    write_results("scale", {**figures, "faults": faults})
    return 1 if faults else 0


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "statement": row["text"][:100],
        "ms": round(row["slowest_ms"], 2),
        "rows read": row["most_read"],
        "how": "; ".join(sorted(row["steps"])),
    }


def _sizes(settings: Settings) -> list[dict[str, Any]]:
    query = (
        "SELECT relname, reltuples::bigint, pg_relation_size(oid), pg_indexes_size(oid) FROM pg_class"
        " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND reltuples > 0"
        " ORDER BY pg_total_relation_size(oid) DESC"
    )
    with psycopg.connect(libpq_url(settings)) as connection:
        rows = connection.execute(query).fetchall()
    return [
        {"table": name, "rows": count, "MB": round(size / 1e6, 1), "indexes MB": round(indexes / 1e6, 1)}
        for name, count, size, indexes in rows
    ]


@contextmanager
def _postgres(folder: Path) -> Iterator[Settings]:
    """A PostgreSQL as `ratchet up` starts it; settings that name it."""
    settings = Settings(state=folder, database_port=free_port())
    embedded.prepare(settings)
    log = (folder / "postgres.log").open("ab")
    with log, subprocess.Popen(embedded.command(settings), stderr=log, cwd="/") as server:
        try:
            embedded.wait_until_ready(settings, lambda: server.poll() is None)
            yield settings
        finally:
            embedded.end_leftovers(embedded.data_folder(settings))


def _database(server: Settings, name: str, num_replies: int, num_votes: int) -> Settings:
    """Make a database, migrate and fill it; settings of a service on it."""
    with psycopg.connect(libpq_url(server), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    url = database_url(server).set(database=name).render_as_string(hide_password=False)
    state = server.state / name
    state.mkdir()
    settings = Settings(database_url=SecretStr(url), state=state, port=free_port())
    schema.upgrade(settings)
    engine = sync_engine(settings)
    with sync_sessions(engine).begin() as session:
        ensure_base(session, "base")
    engine.dispose()
    fill(libpq_url(settings), num_replies, num_votes)
    return settings


@contextmanager
def serving(settings: Settings, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The service with an engine that answers at once; `arguments` are those of `scale_service.py`."""
    assert settings.database_url is not None
    environment = {
        "DATABASE_URL": settings.database_url.get_secret_value(),
        "RATCHET_STATE": str(settings.state),
        "RATCHET_PORT": str(settings.port),
        **PAIRING,
    }
    command = [sys.executable, "-m", "tests.benchmarks.scale_service", *arguments]
    with subprocess.Popen(command, env=os.environ | environment) as service:
        try:
            if wait_until_answering(f"http://127.0.0.1:{settings.port}/readyz", 60) == float("inf"):
                raise RuntimeError("the service did not become ready")
            yield service
        finally:
            service.terminate()


if __name__ == "__main__":
    sys.exit(main())
