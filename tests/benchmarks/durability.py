"""`make bench-durability`: acknowledged votes outlive kill -9 of every part, at any moment, again and again.

In each of three runs 8 clients vote for 60 s while service, engine (real vLLM) and PostgreSQL are killed 20 times in all. Then
what is stored must be what was acknowledged, each vote once, with a history that agrees; and the system must become ready by
itself. kill -9 takes what processes hold in memory, not what the kernel does: a power cut is the business of fsync, whose
settings are checked. Prints a table; writes `results/durability.json`; the exit status is 1 where anything is amiss.

    python -m tests.benchmarks.durability [--seconds 60] [--kills 20] [--seeds 0 1 2]
"""

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from service.settings import Settings
from tests.benchmarks.durability_audit import read_stored, summary, violations
from tests.benchmarks.durability_clients import ANSWER_SECONDS, Client, Tally
from tests.benchmarks.durability_parts import (
    Supervised,
    fresh_settings,
    libpq_url,
    running,
    wait_until_answering,
)
from tests.benchmarks.tables import print_columns, write_results
from tests.tiny_model import make_model

NUM_CLIENTS = 8
COMPARISONS = 40
"""That each client has before the run."""
WEIGHTS = {"service": 2, "postgres": 2, "engine": 1}
"""How likely each part is killed. The engine takes half a minute to start, and would else hardly ever chat."""
START_SECONDS = 300.0
READY_SECONDS = 120.0
"""Longest time to become ready after the last kill."""
LAST_CALLS_SECONDS = 120.0
MOST_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill -9, and what followed."""

    part: str
    how: str
    at: float


def main() -> int:
    """Run it for each seed. Returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-durability-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL may run as somebody else
        model = make_model(Path(folder) / "model")
        results = [_run(Path(folder), model, given.seconds, given.kills, seed) for seed in given.seeds]
    print_columns(results, "seed")
    write_results("durability", {"seconds": given.seconds, "runs": results})
    return 1 if any(result["violations"] or result["ready after s"] is None for result in results) else 0


def _run(folder: Path, model: Path, seconds: float, num_kills: int, seed: int) -> dict[str, Any]:
    settings = fresh_settings(folder / f"state-{seed}", model)
    with running(settings, ["engine", "service"]) as parts:
        ready = f"http://127.0.0.1:{settings.port}/readyz"
        if wait_until_answering(ready, START_SECONDS) == float("inf"):
            raise RuntimeError(f"not ready after {START_SECONDS:g} s; the logs are in {settings.state}")
        run = Run(settings, parts, seed)
        asyncio.run(run.run(seconds, num_kills))
        after_seconds = wait_until_answering(ready, READY_SECONDS)
        return {"seed": seed} | run.result(None if after_seconds == float("inf") else after_seconds)


class Run:
    """One run of clients against parts that are being killed."""

    def __init__(self, settings: Settings, parts: dict[str, Supervised], seed: int) -> None:
        self._settings = settings
        self._parts = parts
        self._chance = random.Random(seed)
        self._tally = Tally()
        self._clients = [Client(f"client-{i}", [], self._tally, seed) for i in range(NUM_CLIENTS)]
        self._kills: list[Kill] = []
        self._began = self._ended = 0.0

    async def run(self, seconds: float, num_kills: int) -> None:
        """Make comparisons, then vote and kill; every call has its answer on return."""
        url = f"http://127.0.0.1:{self._settings.port}"
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        async with aiohttp.ClientSession(url, timeout=timeout) as http:
            await asyncio.gather(*(self._prepare(client, http) for client in self._clients))
            self._tally.counts.clear()
            stop = asyncio.Event()
            voting = [asyncio.create_task(client.vote_until(stop, http)) for client in self._clients]
            chatting = [asyncio.create_task(client.chat_until(stop, http)) for client in self._clients[:2]]
            self._began = time.monotonic()
            await self._kill_at_random(seconds, num_kills)
            self._ended = time.monotonic()
            stop.set()
            async with asyncio.timeout(LAST_CALLS_SECONDS):
                await asyncio.gather(*voting, *chatting)

    async def _prepare(self, client: Client, http: aiohttp.ClientSession) -> None:
        while len(client.voted) < COMPARISONS:
            await client.compare(http)

    async def _kill_at_random(self, seconds: float, num_kills: int) -> None:
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        moments = sorted(self._chance.uniform(0, seconds) for _ in range(num_kills))
        for moment in moments:
            await asyncio.sleep(self._began + moment - time.monotonic())
            name = self._chance.choices(names, weights)[0]
            how = await asyncio.to_thread(self._parts[name].kill, self._chance)
            self._kills.append(Kill(name, how, time.monotonic()))
        await asyncio.sleep(self._began + seconds - time.monotonic())

    def result(self, ready_seconds: float | None) -> dict[str, Any]:
        """All figures of the run."""
        stored = read_stored(libpq_url(self._settings))
        wrong = violations(self._clients, stored) + self._tally.unexpected
        print(*wrong[:MOST_SHOWN], sep="\n", file=sys.stderr)
        counts = self._tally.counts
        return {
            **{f"kills {name}": _by_kind(self._kills, name) for name in WEIGHTS},
            "acknowledged": len(self._tally.acknowledged_at),
            **{name: counts[name] for name in ("given", "revised", "taken back", "delivered twice")},
            **{name: counts[name] for name in ("not reached", "refused", "answers lost", "given up")},
            **summary(self._clients, stored),
            **{name: counts[name] for name in ("comparisons", "chats refused", "chats cut off")},
            "longest outage s": round(max(self._outages()), 2),
            "median outage after a kill s": self._median_outages(),
            "ready after s": None if ready_seconds is None else round(ready_seconds, 1),
            "violations": len(wrong),
            "first violations": wrong[:MOST_SHOWN],
        }

    def _outages(self) -> list[float]:
        """Times between an acknowledged vote and the next, seconds."""
        moments = [self._began, *self._tally.acknowledged_at, self._ended]
        moments = sorted(moment for moment in moments if self._began <= moment <= self._ended)
        return [after - before for before, after in itertools.pairwise(moments)]

    def _median_outages(self) -> dict[str, float]:
        """Seconds from the kill of a part to the next acknowledged vote."""
        return {
            name: round(statistics.median(waits), 2) for name in WEIGHTS if (waits := self._waits_after(name))
        }

    def _waits_after(self, part: str) -> list[float]:
        moments = sorted(self._tally.acknowledged_at)
        starts = [kill.at for kill in self._kills if kill.part == part]
        return [next((moment - at for moment in moments if moment > at), self._ended - at) for at in starts]


def _by_kind(kills: Sequence[Kill], part: str) -> dict[str, int]:
    return dict(Counter(kill.how for kill in kills if kill.part == part))


if __name__ == "__main__":
    sys.exit(main())
