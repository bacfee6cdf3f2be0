"""Ratchet, LiteLLM and TensorZero before one mock engine: throughput, CPU time, added latency. See `gateway.py`.

All of them run all the time; each round visits every contestant, in a new random order under every load, so that what else the
machine does falls on all alike. The base is `direct`: the same requests to the mock itself.
"""

import asyncio
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvloop

from tests.benchmarks.gateway_engine import TOKENS, WORD
from tests.benchmarks.gateway_load import Ask, Exchange, at_rate, check, saturate
from tests.benchmarks.gateway_samples import Kind, Load, Meter, Sample, Samples, percentile
from tests.benchmarks.gateway_servers import Contestant, litellm, mock_engine, ratchet, tensorzero

KINDS: tuple[Kind, ...] = ("whole", "stream")
AT_ONCE = (8, 64)
QUESTION = "What colour is the fruit that hangs before the window, and what does it taste of?"
WARM_SECONDS = 0.7
MEASURED = ("event", "first", "whole")
MARK = WORD.encode()
SETTLE_SECONDS = 5.0
SETTLE_STEP_SECONDS = 0.2
SETTLED_BUSY = 0.1
"""Share of a core below which a contestant counts as idle."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure. A visit is one contestant under one load."""

    rounds: int
    seconds: float
    """Of a visit as fast as it goes."""
    rate: float
    """Requests a second of a visit at the fixed rate."""
    rate_seconds: float
    one_by_one: bool = False
    """Whether the mock sends one token a chunk whatever it is asked."""


@dataclass(frozen=True, slots=True)
class Field:
    """Everything that takes part."""

    contestants: list[Contestant]
    mock: psutil.Process
    answered: Counter[str] = field(default_factory=Counter)
    """Right answers so far, by contestant."""


def run(plan: Plan, state: Path, say: Callable[[str], None]) -> Samples:
    """Start all, measure all rounds, end all."""
    samples = Samples()
    say("mock: starting the mock, Ratchet with PostgreSQL, LiteLLM and TensorZero")
    with (
        tempfile.TemporaryDirectory(prefix="mock-", dir=state) as folder,
        _started(plan, Path(folder)) as entered,
    ):
        uvloop.run(_warm(entered))
        for number in range(plan.rounds):
            say(f"mock: round {number + 1} of {plan.rounds}")
            uvloop.run(_round(plan, entered, number, samples))
        _check_stored(entered, say)
    return samples


def _check_stored(entered: Field, say: Callable[[str], None]) -> None:
    """Raises RuntimeError where a contestant that stores replies has not stored just those that it gave."""
    for contestant in entered.contestants:
        if contestant.num_stored is None:
            continue
        stored, answered = contestant.num_stored(), entered.answered[contestant.name]
        say(f"mock: {contestant.name} gave {answered} answers and stored {stored}")
        if stored != answered:
            raise RuntimeError(f"{contestant.name} gave {answered} answers and stored {stored}")


@contextmanager
def _started(plan: Plan, folder: Path) -> Iterator[Field]:
    with ExitStack() as stack:
        direct, mock = stack.enter_context(mock_engine(folder, one_by_one=plan.one_by_one))
        state = folder / "ratchet"
        state.mkdir()
        gateways = [
            stack.enter_context(ratchet(direct, state)),
            stack.enter_context(litellm(direct, folder)),
            stack.enter_context(tensorzero(direct, folder)),
        ]
        yield Field([direct, *gateways], mock)


async def _warm(entered: Field) -> None:
    """First requests import, connect and prepare statements; they are not counted. Raises RuntimeError for a fault."""
    for contestant in entered.contestants:
        for kind in KINDS:
            flow = await saturate(_ask(contestant, kind), max(AT_ONCE), 0, 1.0, lambda: None)
            check(contestant.name, flow)
            entered.answered[contestant.name] += flow.answers


async def _round(plan: Plan, entered: Field, number: int, samples: Samples) -> None:
    chance = random.Random(number)
    for kind in KINDS:
        for streams in (*AT_ONCE, 0):
            load = Load(kind, streams)
            for contestant in chance.sample(entered.contestants, len(entered.contestants)):
                visit = (
                    _fast(plan, entered, contestant, load)
                    if streams
                    else _gentle(plan, entered, contestant, load, chance)
                )
                values, latencies, faults = await visit
                await _settle(contestant)
                samples.all.append(Sample(load, contestant.name, number, values, latencies, faults))


Visited = tuple[dict[str, float], dict[str, list[float]], list[str]]
"""Values, latencies in ms, faults."""


async def _fast(plan: Plan, entered: Field, contestant: Contestant, load: Load) -> Visited:
    """As fast as it goes: requests a second, and CPU time of a request by process."""
    meter = Meter(contestant.processes | {"mock": entered.mock})
    flow = await saturate(_ask(contestant, load.kind), load.streams, WARM_SECONDS, plan.seconds, meter)
    entered.answered[contestant.name] += flow.answers
    values = {"requests_per_second": flow.requests / flow.seconds}
    for name in meter.names:
        values[f"{name}_cpu_ms"] = (
            1000 * meter.seconds(name) / flow.requests if flow.requests else float("nan")
        )
        values[f"{name}_busy"] = meter.seconds(name) / flow.seconds
    return values, {}, _texts(flow.faults)


async def _gentle(
    plan: Plan, entered: Field, contestant: Contestant, load: Load, chance: random.Random
) -> Visited:
    """At the fixed rate: latencies, and how busy that keeps it."""
    meter = Meter(contestant.processes)
    meter()
    exchanges = await at_rate(_ask(contestant, load.kind), plan.rate, plan.rate_seconds, chance)
    meter()
    busy = sum(map(meter.seconds, contestant.processes)) / plan.rate_seconds
    whole = [each for each in exchanges if not each.fault]
    entered.answered[contestant.name] += len(whole)
    latencies = {name: [1000 * _seconds(each, name) for each in whole] for name in MEASURED}
    values = {f"{name}_p50_ms": percentile(ms, 50) for name, ms in latencies.items()}
    return values | {"busy": busy}, latencies, _texts([each.fault for each in exchanges if each.fault])


def _seconds(exchange: Exchange, measured: str) -> float:
    """From sending to the first event, the first token, the end. An answer in one piece has but an end."""
    at = {"event": exchange.event or exchange.ended, "first": exchange.first, "whole": exchange.ended}
    return at[measured] - exchange.began


async def _settle(contestant: Contestant) -> None:
    """Wait until it has done what it puts off until after its answers, so that nobody else pays for that."""
    for _ in range(round(SETTLE_SECONDS / SETTLE_STEP_SECONDS)):
        meter = Meter(contestant.processes)
        meter()
        await asyncio.sleep(SETTLE_STEP_SECONDS)
        meter()
        if sum(map(meter.seconds, contestant.processes)) <= SETTLED_BUSY * SETTLE_STEP_SECONDS:
            return


def _texts(faults: list[bytes]) -> list[str]:
    return [fault.decode(errors="replace") for fault in faults]


def _ask(contestant: Contestant, kind: Kind) -> Ask:
    body = {
        "model": contestant.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "temperature": 1.0,
        "stream": kind == "stream",
    }
    request = contestant.address.request(contestant.path, json.dumps(body).encode())
    return Ask(contestant.address, (request,), _count, MARK)


def _count(response: bytes) -> int:
    """The tokens, all of which must be there."""
    complete = response.startswith(b"HTTP/1.1 200 ") and response.count(MARK) == TOKENS
    return TOKENS if complete else 0
