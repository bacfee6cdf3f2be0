"""Writes what `gateway.py` measured as Markdown: the tables, and the goals beside what was reached."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tests.benchmarks import gateway_mock, gateway_vllm
from tests.benchmarks.gateway_samples import Kind, Load, Mean, Samples, Spread

RATCHET, LITELLM, TENSORZERO, DIRECT, VLLM = "Ratchet", "LiteLLM", "TensorZero", "direct", "vllm"
WORDS: dict[Kind, str] = {"whole": "not streamed", "stream": "streamed"}
MEASURES = {"event": "first event", "first": "first token", "whole": "whole stream"}
CONTESTANTS = (RATCHET, LITELLM, TENSORZERO, DIRECT)
SATURATED = 0.7
"""Share of a core past which a gateway on one thread queues."""
COSTS = (
    ("Ratchet, service", RATCHET, "service"),
    ("Ratchet, PostgreSQL", RATCHET, "postgres"),
    ("LiteLLM", LITELLM, "gateway"),
    ("TensorZero", TENSORZERO, "gateway"),
    ("(the mock, asked directly)", DIRECT, "mock"),
    ("(the load generator, asking directly)", DIRECT, "load"),
)


@dataclass(frozen=True, slots=True)
class Goal:
    """What was wanted and what was reached."""

    name: str
    wanted: str
    reached: str
    met: bool


def mock_report(samples: Samples, rate: float) -> str:
    """Throughput, CPU time, latency, goals."""
    parts = [
        "### As fast as they go: requests/s, median of the rounds [least, most]",
        _throughput(samples),
        "### CPU time of a request in ms, and requests/s that one core would give",
        _costs(samples),
        f"### At {rate:g} requests/s: ms added to the engine's own",
        f"p50: median of the rounds [least, most]; p99: of all rounds' requests together. `{DIRECT}` is the engine itself.",
        _latencies(samples),
    ]
    return "\n\n".join(parts)


def vllm_report(samples: Samples) -> str:
    """Tokens a second, bare and through Ratchet, and the CPU time behind them."""
    rows = [_vllm_row(samples, load) for load in _vllm_loads()]
    head = [
        "at once",
        "bare vLLM, tokens/s",
        "through Ratchet, tokens/s",
        "ratio",
        "geometric mean ± standard error",
    ]
    head += ["CPU ms a token: bare engine", "engine through Ratchet + service + PostgreSQL"]
    length = samples.spread(_vllm_loads()[0], RATCHET, "tokens_per_reply").median
    title = f"### Real vLLM, replies of {length:.1f} tokens: median of the rounds [least, most]"
    return f"{title}\n\n{table(head, rows)}"


def _vllm_row(samples: Samples, load: Load) -> list[str]:
    bare, through = (samples.spread(load, name, "tokens_per_second") for name in (VLLM, RATCHET))
    ratio = samples.ratio(load, "tokens_per_second", RATCHET, VLLM)
    mean = samples.mean_ratio(load, "tokens_per_second", RATCHET, VLLM)
    alone = samples.spread(load, VLLM, "engine_cpu_ms").median
    costs = [
        samples.spread(load, RATCHET, f"{name}_cpu_ms").median for name in ("engine", "service", "postgres")
    ]
    words = [
        f"{WORDS[load.kind]}, {load.streams}",
        show(bare, 0),
        show(through, 0),
        show(ratio, 3),
        show_mean(mean),
    ]
    return [*words, f"{alone:.3f}", " + ".join(f"{cost:.3f}" for cost in costs)]


def goals_report(goals: list[Goal]) -> str:
    """One row a goal."""
    rows = [[goal.name, goal.wanted, goal.reached, "yes" if goal.met else "**no**"] for goal in goals]
    return "### Goals\n\n" + table(["goal", "wanted", "reached", "met"], rows)


def faults_report(samples: Samples) -> str:
    """Every contestant that did not answer as it should, with one of its answers; empty where there is none."""
    lines = [
        f"- {each.contestant}, {each.load}, round {each.round}: {len(each.faults)} faults, such as "
        f"{json.dumps(each.faults[0][:300])}"
        for each in samples.all
        if each.faults
    ]
    return "\n".join(["### Faults", "", *lines]) if lines else ""


def vllm_goals(samples: Samples) -> Iterator[Goal]:
    """At least 0.95 of the bare engine's tokens, in the mean of the rounds."""
    for load in _vllm_loads():
        mean = samples.mean_ratio(load, "tokens_per_second", RATCHET, VLLM)
        name = f"tokens/s over bare vLLM, {WORDS[load.kind]}, {load.streams} at once"
        yield Goal(name, ">= 0.95", show_mean(mean), mean.value >= 0.95)


def mock_goals(samples: Samples) -> Iterator[Goal]:
    """Against the peers."""
    yield from _throughput_goals(samples)
    yield from _tail_goals(samples)
    yield from _first_token_goals(samples)


def _throughput_goals(samples: Samples) -> Iterator[Goal]:
    aims: list[tuple[Kind, str, float]] = [
        ("whole", LITELLM, 5.0),
        ("stream", LITELLM, 10.0),
        ("stream", TENSORZERO, 1.0),
    ]
    for kind, peer, times in aims:
        for streams in gateway_mock.AT_ONCE:
            ratio = samples.ratio(Load(kind, streams), "requests_per_second", RATCHET, peer)
            name = f"throughput over {peer}'s, {WORDS[kind]}, {streams} at once"
            yield Goal(name, f">= {times:g}", show(ratio, 2), ratio.median >= times)


def _tail_goals(samples: Samples) -> Iterator[Goal]:
    whole, stream = Load("whole", 0), Load("stream", 0)
    for load, measure in ((whole, "whole"), (stream, "first"), (stream, "whole")):
        ours, theirs = (_added_p99(samples, load, measure, name) for name in (RATCHET, LITELLM))
        name = f"added p99 over {LITELLM}'s, {_measure(load, measure)}"
        yield Goal(
            name, "<= 0.2", f"{ours / theirs:.3f} ({ours:.1f} / {theirs:.1f} ms)", ours / theirs <= 0.2
        )


def _first_token_goals(samples: Samples) -> Iterator[Goal]:
    """Against TensorZero's first token, and against its first event, which is empty and comes much earlier."""
    load = Load("stream", 0)
    ours = samples.added(load, "first_p50_ms", RATCHET, DIRECT).median
    for measure, limit in (("first", 2.0), ("event", 2.0)):
        theirs = samples.added(load, f"{measure}_p50_ms", TENSORZERO, DIRECT).median
        name = f"added p50 to the first token over {TENSORZERO}'s to its {MEASURES[measure]}"
        yield Goal(
            name,
            f"<= {limit:g}",
            f"{ours / theirs:.2f} ({ours:.2f} / {theirs:.2f} ms)",
            ours / theirs <= limit,
        )
    ours, theirs = (
        samples.added(load, "whole_p50_ms", name, DIRECT).median for name in (RATCHET, TENSORZERO)
    )
    name = f"added p50 to the whole stream over {TENSORZERO}'s"
    yield Goal(name, "< 1", f"{ours / theirs:.2f} ({ours:.2f} / {theirs:.2f} ms)", ours < theirs)


def _throughput(samples: Samples) -> str:
    loads = _fast_loads()
    rows = [
        [name, *(show(samples.spread(load, name, "requests_per_second"), 0) for load in loads)]
        for name in CONTESTANTS
    ]
    return table(["", *(f"{WORDS[load.kind]}, {load.streams} at once" for load in loads)], rows)


def _costs(samples: Samples) -> str:
    rows = []
    for title, contestant, process in COSTS:
        spent = [samples.spread(load, contestant, f"{process}_cpu_ms") for load in _fast_loads()]
        rows.append([title, *(f"{each.median:.2f} ({_per_core(each.median)}/s)" for each in spent)])
    return table(["", *(f"{WORDS[load.kind]}, {load.streams} at once" for load in _fast_loads())], rows)


def _per_core(milliseconds: float) -> str:
    return f"{1000 / milliseconds:,.0f}" if milliseconds else "-"


def _latencies(samples: Samples) -> str:
    columns = [(Load("whole", 0), "whole"), *((Load("stream", 0), measure) for measure in MEASURES)]
    rows = []
    for name in CONTESTANTS:
        cells = []
        for load, measure in columns:
            p99 = samples.percentile(load, name, measure, 99)
            if name == DIRECT:
                cells.append(f"{show(samples.spread(load, name, f'{measure}_p50_ms'), 2)}, p99 {p99:.1f}")
            else:
                added = samples.added(load, f"{measure}_p50_ms", name, DIRECT)
                cells.append(f"+{show(added, 2)}, p99 +{_added_p99(samples, load, measure, name):.1f}")
        busy = [f"{samples.spread(Load(kind, 0), name, 'busy').median:.0%}" for kind in gateway_mock.KINDS]
        rows.append([name, *cells, " / ".join(busy)])
    head = ["", *(_measure(*column) for column in columns), "of a core used, not streamed / streamed"]
    return table(head, rows)


def _added_p99(samples: Samples, load: Load, measure: str, contestant: str) -> float:
    ours, base = (samples.percentile(load, name, measure, 99) for name in (contestant, DIRECT))
    return ours - base


def _measure(load: Load, measure: str) -> str:
    return WORDS["whole"] if load.kind == "whole" else MEASURES[measure]


def _fast_loads() -> list[Load]:
    return [Load(kind, streams) for kind in gateway_mock.KINDS for streams in gateway_mock.AT_ONCE]


def _vllm_loads() -> list[Load]:
    return [Load(kind, streams) for kind in gateway_vllm.KINDS for streams in gateway_vllm.AT_ONCE]


def show(spread: Spread, digits: int) -> str:
    """The median, and the least and the most in brackets."""
    least, middle, most = (f"{x:,.{digits}f}" for x in (spread.least, spread.median, spread.most))
    return f"{middle} [{least}, {most}]"


def show_mean(mean: Mean) -> str:
    """With its standard error."""
    return f"{mean.value:.3f} ± {mean.error:.3f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_json(machine: dict[str, str], options: dict[str, object], samples: Samples, goals: list[Goal]) -> str:
    """All of a run, for later comparison."""
    content = {
        "machine": machine,
        "options": options,
        "goals": [asdict(goal) for goal in goals],
        "samples": [asdict(sample) for sample in samples.all],
    }
    return json.dumps(content, indent=1) + "\n"
