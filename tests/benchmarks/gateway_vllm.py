"""A real vLLM on the CPU, bare and through Ratchet: tokens a second. See `gateway.py`.

Both are asked the same questions with the same seeds, for replies of the same lengths: the model is the starter, made to take
another token for its end (its own replies have 8 on average, and few of a large model's are so short). The lengths differ
among requests, as users' do: were they all equal, a closed loop of bare requests would end and begin in step, and the engine
have full batches that nobody's users give it. What is counted is the engine's own `usage`.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import uvloop

from tests.benchmarks.gateway_load import EVENT, Ask, check, saturate
from tests.benchmarks.gateway_samples import Kind, Load, Meter, Sample, Samples
from tests.benchmarks.gateway_servers import Contestant, ratchet, vllm_engine
from trainer import world

KINDS: tuple[Kind, ...] = ("whole", "stream")
AT_ONCE = (1, 8, 32)
QUESTIONS = 512
WARM_SECONDS = 1.0
FIRST_SECONDS = 8.0
"""The engine is slow while it meets each size of batch for the first time."""
USED = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure. A visit is one contestant under one load."""

    rounds: int
    seconds: float
    reply_tokens: int
    """Mean length of replies; each is between half of it and one and a half."""


def run(plan: Plan, state: Path, say: Callable[[str], None]) -> Samples:
    """Make the model where it is not there yet, start all, measure all rounds, end all."""
    samples = Samples()
    starter = _starter(state, say)
    say("vllm: starting the engine, Ratchet and PostgreSQL")
    with (
        tempfile.TemporaryDirectory(prefix="vllm-", dir=state) as folder,
        vllm_engine(_endless(starter, Path(folder) / "model"), Path(folder)) as bare,
        ratchet(bare, Path(folder)) as service,
    ):
        contestants = [bare, replace(service, processes=bare.processes | service.processes)]
        uvloop.run(_warm(plan, contestants))
        for number in range(plan.rounds):
            say(f"vllm: round {number + 1} of {plan.rounds}")
            uvloop.run(_round(plan, contestants, number, samples))
    return samples


def _starter(state: Path, say: Callable[[str], None]) -> Path:
    """The starter of seed 0, in a folder that is kept."""
    folder = (state / "starter").resolve()
    if not (folder / "starter.json").exists():
        say("vllm: making the starter model (about two minutes, once)")
    command = [sys.executable, "-m", "trainer.starter", "--out", str(folder), "--seed", "0"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def _endless(starter: Path, folder: Path) -> Path:
    """A copy whose end of a reply is the padding token, which it never says: replies end at `max_tokens`."""
    shutil.copytree(starter, folder)
    for file, key, names in (
        ("config.json", "eos_token_id", "pad_token_id"),
        ("generation_config.json", "eos_token_id", "pad_token_id"),
        ("tokenizer_config.json", "eos_token", "pad_token"),
    ):
        content = json.loads((folder / file).read_text())
        content[key] = content[names]
        (folder / file).write_text(json.dumps(content))
    return folder


async def _warm(plan: Plan, contestants: list[Contestant]) -> None:
    for contestant in contestants:
        for streams in AT_ONCE:
            ask = _ask(contestant, "stream", plan.reply_tokens)
            flow = await saturate(ask, streams, 0, FIRST_SECONDS / len(AT_ONCE), lambda: None)
            check(contestant.name, flow)


async def _round(plan: Plan, contestants: list[Contestant], number: int, samples: Samples) -> None:
    chance = random.Random(number)
    for kind in KINDS:
        for streams in AT_ONCE:
            for contestant in chance.sample(contestants, len(contestants)):
                samples.all.append(await _visit(plan, contestant, Load(kind, streams), number))


async def _visit(plan: Plan, contestant: Contestant, load: Load, number: int) -> Sample:
    ask = _ask(contestant, load.kind, plan.reply_tokens)
    meter = Meter(contestant.processes)
    flow = await saturate(ask, load.streams, WARM_SECONDS, plan.seconds, meter)
    values = {
        "tokens_per_second": flow.tokens / flow.seconds,
        "tokens_per_reply": flow.tokens / flow.requests,
    }
    values |= {f"{name}_cpu_ms": 1000 * meter.seconds(name) / flow.tokens for name in meter.names}
    faults = [fault.decode(errors="replace") for fault in flow.faults]
    return Sample(load, contestant.name, number, values, faults=faults)


def _ask(contestant: Contestant, kind: Kind, reply_tokens: int) -> Ask:
    chance = random.Random(0)
    requests = []
    for seed in range(QUESTIONS):
        length = chance.randint(reply_tokens // 2, reply_tokens * 3 // 2)
        body = _body(contestant.model, kind, world.draw_question(chance), seed, length)
        requests.append(contestant.address.request(contestant.path, body))
    return Ask(contestant.address, tuple(requests), _count, EVENT)


def _body(model: str, kind: Kind, question: world.Question, seed: int, reply_tokens: int) -> bytes:
    body = {
        "model": model,
        "messages": list(question.messages),
        "max_tokens": reply_tokens,
        "temperature": 1.0,
        "top_p": 1.0,  # named, so that Ratchet asks for no filter of its own, and the engine does the same for both
        "seed": seed,
        "stream": kind == "stream",
    }
    return json.dumps(
        body | ({"stream_options": {"include_usage": True}} if kind == "stream" else {})
    ).encode()


def _count(response: bytes) -> int:
    used = USED.findall(response) if response.startswith(b"HTTP/1.1 200 ") else []
    return int(used[-1]) if used else 0
