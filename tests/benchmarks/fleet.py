"""`make bench-fleet`: what users notice when one of two replicas is killed with -9 under load, again and again.

Two real vLLMs with the tests' tiny model, and a policy live, by either delivery. Clients stream replies through the service all the
time. First policies are promoted and rolled back. Then one of the engines, by chance, loses all of its processes or one of them,
and is started again; once it holds the policy and reproduces it, the next one is killed. Afterwards every reply's tokens are
compared, by their log-probabilities, with those of the policy that it names. Prints tables in Markdown; writes
`results/fleet-*.json`; the exit status is 1 where a reply was cut silently, failed that had not begun, or is of another policy.

    python -m tests.benchmarks.fleet [--delivery merged] [--swaps 5] [--kills 10] [--clients 8] [--seed 0]
"""

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import aiohttp
import uvloop

from service.engine_process import engine_command, engine_environment
from service.processes import Part
from service.schemas import ALIAS
from service.settings import Settings
from tests.benchmarks.durability_parts import Supervised, fresh_settings, running, wait_until_answering
from tests.benchmarks.fleet_report import Kill, Trial, examine, goals, report
from tests.benchmarks.gateway_report import goals_report
from tests.benchmarks.swap_clients import streaming
from tests.benchmarks.swap_policies import Scorer, make_policies
from tests.benchmarks.swap_ways import Operator
from tests.benchmarks.tables import write_results
from tests.engine import free_port
from tests.tiny_model import make_model

NUM_REPLICAS = 2
START_SECONDS = 240.0
"""For two engines that start at once on two cores."""
BACK_SECONDS = 120.0
NOTICE_SECONDS = 40.0
QUIET_SECONDS = 3.0
"""With both replicas, before one is killed."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine and its address."""

    url: str
    engine: Supervised


def main() -> int:
    """Run it. Returns the exit status."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="ratchet-fleet-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL may run as somebody else
        base = make_model(folder / "model")
        merged = options.delivery == "merged"
        policies = make_policies(folder / "policies", base, 2 + options.swaps, merged=merged)
        _say("starting two engines")
        with running_replicas(folder, base, options.delivery) as replicas:
            changes = {
                "engine_urls": tuple(replica.url for replica in replicas),
                "delivery": options.delivery,
                "watch_share": 0.0,  # with merged delivery a watch keeps one replica at the policy before
            }
            settings = fresh_settings(folder / "state", base).model_copy(update=changes)
            with running(settings, ["service"]):
                trial = uvloop.run(_try(settings, replicas, policies, options))
        _say("computing log-probabilities")
        figures = examine(trial, Scorer(base, policies))
    wanted = goals(figures)
    print(report(figures))
    print()
    print(goals_report(wanted))
    write_results(f"fleet-{options.delivery}", {"options": vars(options), **asdict(figures)})
    return 0 if all(goal.met for goal in wanted) else 1


@contextmanager
def running_replicas(
    folder: Path, base: Path, delivery: Literal["adapter", "merged"]
) -> Iterator[list[Replica]]:
    """Engines that start again when they end; all answer, and have generated, on entering. Raises RuntimeError."""
    replicas: list[Replica] = []
    try:
        for number in range(NUM_REPLICAS):
            settings = Settings(state=folder, model=str(base), engine_port=free_port(), delivery=delivery)
            # Texts do not tell tokens apart: half a character has none.
            command = [*engine_command(settings, base), "--return-tokens-as-token-ids"]
            engine = Supervised(
                Part("engine", command, engine_environment(settings, base)), folder / f"engine-{number}.log"
            )
            replicas.append(Replica(f"http://127.0.0.1:{settings.engine_port}", engine))
        for replica in replicas:
            if wait_until_answering(f"{replica.url}/health", START_SECONDS) == float("inf"):
                raise RuntimeError(f"vLLM did not start; the logs are in {folder}")
        yield replicas
    finally:
        for replica in replicas:
            replica.engine.stop()


async def _try(
    settings: Settings, replicas: list[Replica], policies: list[Path], options: argparse.Namespace
) -> Trial:
    url = f"http://127.0.0.1:{settings.port}"
    chance = random.Random(options.seed)
    if await asyncio.to_thread(wait_until_answering, f"{url}/readyz", BACK_SECONDS) == float("inf"):
        raise RuntimeError(f"the service is not ready; its log is in {settings.state}")
    async with aiohttp.ClientSession(url) as http:
        operator = Operator(settings, policies, http)
        for _ in range(2):
            live = (await operator.promote()).new
            await _wait_until_all_hold(http, live)
        async with streaming(url, ALIAS, options.clients) as exchanges:
            trial = Trial(exchanges)
            for number in range(options.swaps):
                await asyncio.sleep(QUIET_SECONDS)
                for move in (operator.promote, operator.roll_back):
                    swap = await move()
                    await _wait_until_all_hold(http, swap.new)
                    trial.swap_seconds.append(perf_counter() - swap.began)
                _say(f"swap {number + 1} of {options.swaps}: there and back")
            for number in range(options.kills):
                await asyncio.sleep(QUIET_SECONDS)
                replica = chance.choice(replicas)
                at = perf_counter()
                how = await asyncio.to_thread(replica.engine.kill, chance)
                _say(f"kill {number + 1} of {options.kills}: {how} of replica {replicas.index(replica)}")
                await _wait_until_lost(http, replica.url)
                lost = perf_counter()
                await _wait_until_all_hold(http, live)
                trial.kills.append(Kill(replicas.index(replica), how, at, lost - at, perf_counter() - at))
            await asyncio.sleep(QUIET_SECONDS)
        trial.ended = perf_counter()
        trial.retries = await _retries(http)
    return trial


async def _retries(http: aiohttp.ClientSession) -> float:
    async with http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("ratchet_retries_total"))


async def _states(http: aiohttp.ClientSession) -> list[dict[str, Any]]:
    async with http.get("/operator/replicas") as response:
        states: list[dict[str, Any]] = await response.json()
        return states


async def _wait_until_lost(http: aiohttp.ClientSession, url: str) -> None:
    """Until the service has noticed. (The process that was killed may be one that the engine can do without.)"""
    with suppress(TimeoutError):
        async with asyncio.timeout(NOTICE_SECONDS):
            await _poll_until_lost(http, url)


async def _poll_until_lost(http: aiohttp.ClientSession, url: str) -> None:
    while any(state["url"] == url and state["healthy"] for state in await _states(http)):
        await asyncio.sleep(POLL_SECONDS / 4)


async def _wait_until_all_hold(http: aiohttp.ClientSession, policy: str) -> None:
    """Until every replica may be asked for the policy again."""
    async with asyncio.timeout(BACK_SECONDS):
        while not all(state["healthy"] and policy in state["policies"] for state in await _states(http)):
            await asyncio.sleep(POLL_SECONDS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill replicas under load.")
    parser.add_argument("--delivery", choices=("adapter", "merged"), default="adapter")
    parser.add_argument("--swaps", type=int, default=5, help="promotions, each with a rollback after it")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
