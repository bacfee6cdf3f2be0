"""`make bench-swap`: what users notice when another policy goes live, with Ratchet's swap and with the two usual ways.

32 clients stream replies from a real vLLM through the service, in turns of some seconds without swaps and some with: ten policies
go live one after the other, and ten rollbacks exchange them. Every token's log-probability is then computed anew, which tells
whose it is. After that, in the same run, the same clients ask the same engine directly while its weights are
reloaded in place, and while it is restarted: neither is anything that the service does.

Prints tables in Markdown; writes `results/swap.json`.

    python -m tests.benchmarks.swap [--turns 10] [--seconds 5]
"""

import argparse
import asyncio
import gc
import sys
import tempfile
from collections.abc import Awaitable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import aiohttp
import uvloop

from service.policies import BASE
from service.schemas import ALIAS
from service.settings import Settings
from tests.benchmarks.durability_parts import fresh_settings, running, wait_until_answering
from tests.benchmarks.gateway_report import goals_report
from tests.benchmarks.swap_clients import streaming
from tests.benchmarks.swap_policies import Scorer, make_policies, merge
from tests.benchmarks.swap_replies import Span
from tests.benchmarks.swap_report import Trial, examine, goals, report
from tests.benchmarks.swap_ways import Engine, Operator, running_engine
from tests.benchmarks.tables import write_results
from tests.tiny_model import make_model

WARM_SECONDS = 8.0
"""The engine is slow while it meets each size of batch, and each number of adapters, for the first time."""
SHORT_WARM_SECONDS = 4.0
NUM_FIRST = 2
"""Policies that go live before measuring begins, so that every swap is from one adapter to another."""
RELOADS = {"keep": 5, "wait": 3}
"""How often, by what pausing does to the replies under way: they go on afterwards, or are waited for."""
RELOAD_PAUSE_SECONDS = 1.5
READY_SECONDS = 120.0


def main() -> None:
    """Run it all."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="ratchet-swap-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL may run as somebody else
        base = make_model(folder / "model")
        policies = make_policies(folder / "policies", base, NUM_FIRST + options.turns)
        merged = [merge(base, policy, folder / "merged" / policy.name) for policy in policies[:2]]
        settings = fresh_settings(folder / "state", base)
        _say("starting the engine")
        gc.freeze()  # a collection that looks at all of torch would be a gap of its own
        with running_engine(settings, base) as engine:
            trials = [_try_service(settings, policies, options.turns, options.seconds)]
            for mode, num in RELOADS.items():
                _say(f"reloading in place, mode {mode}")
                trials.append(uvloop.run(_reload(engine, mode, num, merged, options.seconds)))
            _say("restarting")
            trials.append(uvloop.run(_restart(engine, merged, options.seconds)))
        _say("computing log-probabilities")
        of_service = Scorer(base, policies)
        of_engine = Scorer(base, policies[:2])
        figures = [examine(trial, of_service if trial.labelled else of_engine) for trial in trials]
    print(report(figures))
    print()
    print(goals_report(goals(figures[0])))
    write_results("swap", {"options": vars(options), "trials": [asdict(each) for each in figures]})


def _try_service(settings: Settings, policies: list[Path], turns: int, seconds: float) -> Trial:
    """Ratchet's swap: PostgreSQL and service run meanwhile."""
    _say("starting PostgreSQL and the service")
    url = f"http://127.0.0.1:{settings.port}"
    with running(settings, ["service"]):
        if wait_until_answering(f"{url}/readyz", READY_SECONDS) == float("inf"):
            raise RuntimeError(f"the service is not ready after {READY_SECONDS:g} s")
        return uvloop.run(_swap_in_turns(url, settings, policies, turns, seconds))


async def _swap_in_turns(
    url: str, settings: Settings, policies: list[Path], turns: int, seconds: float
) -> Trial:
    async with aiohttp.ClientSession(url) as http, streaming(url, ALIAS) as exchanges:
        trial = Trial("Ratchet: promotions and rollbacks", exchanges, labelled=True)
        operator = Operator(settings, policies, http)
        await asyncio.sleep(WARM_SECONDS)
        for _ in range(NUM_FIRST):
            await operator.promote()
        await operator.roll_back()
        await asyncio.sleep(WARM_SECONDS)
        for number in range(turns):
            _say(f"turn {number + 1} of {turns}")
            trial.quiet.append(await _timed(asyncio.sleep(seconds)))
            changes = [operator.promote, operator.roll_back]
            began = perf_counter()
            for change in changes if number % 2 == 0 else reversed(changes):
                trial.swaps.append(await change())
                await asyncio.sleep(seconds / len(changes))
            trial.swapping.append(Span(began, perf_counter()))
    return trial


async def _reload(engine: Engine, mode: str, num: int, models: list[Path], seconds: float) -> Trial:
    """Two models take turns in one engine."""
    old, new = models
    await engine.reload("wait", old, BASE)
    async with streaming(engine.url, BASE) as exchanges:
        trial = Trial(f"in place: pause ({mode}), reload, resume", exchanges, labelled=False)
        await asyncio.sleep(SHORT_WARM_SECONDS)
        trial.quiet.append(await _timed(asyncio.sleep(seconds)))
        began = perf_counter()
        for _ in range(num):
            trial.swaps.append(await engine.reload(mode, new, old.name))
            old, new = new, old
            await asyncio.sleep(RELOAD_PAUSE_SECONDS)
        trial.swapping.append(Span(began, perf_counter()))
    return trial


async def _restart(engine: Engine, models: list[Path], seconds: float) -> Trial:
    """Another model by ending the engine and starting it."""
    old, new = models
    await engine.reload("wait", old, BASE)
    async with streaming(engine.url, BASE) as exchanges:
        trial = Trial("restart of the engine", exchanges, labelled=False)
        await asyncio.sleep(SHORT_WARM_SECONDS)
        trial.quiet.append(await _timed(asyncio.sleep(seconds)))
        began = perf_counter()
        trial.swaps.append(await engine.restart(new, old.name))
        await asyncio.sleep(seconds)
        trial.swapping.append(Span(began, perf_counter()))
    return trial


async def _timed(work: Awaitable[None]) -> Span:
    began = perf_counter()
    await work
    return Span(began, perf_counter())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what users notice of a swap.")
    parser.add_argument(
        "--turns", type=int, default=10, help="without swaps, and with a promotion and a rollback"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn without swaps")
    return parser.parse_args()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
