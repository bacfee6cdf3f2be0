"""From what clients received to figures and tables in Markdown. Used by `fleet.py`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from tests.benchmarks.gateway_report import Goal, table
from tests.benchmarks.gateway_samples import percentile
from tests.benchmarks.swap_clients import Exchange
from tests.benchmarks.swap_policies import Scorer, find_origins
from tests.benchmarks.swap_replies import Reply, Span, longest_silence, read

FELT_SECONDS = 5.0
"""After a kill: first tokens that came so soon after it are looked at by themselves."""
MOST_SHOWN = 5
End = Literal["whole", "error event", "cut silently", "failed before its first token"]


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill -9. Times are `perf_counter`'s, or seconds from the kill."""

    replica: int
    how: str
    """`all` of its processes, its `first` one, or an `other` one."""
    at: float
    noticed_seconds: float
    """Until the service called it unhealthy."""
    back_seconds: float
    """Until it was verified again."""


@dataclass(slots=True)
class Trial:
    """What clients received meanwhile."""

    exchanges: list[Exchange]
    swap_seconds: list[float] = field(default_factory=list)
    """Of each promotion and rollback: until every replica held the new live policy."""
    kills: list[Kill] = field(default_factory=list)
    retries: float = 0.0
    """Requests whose replica failed with them before a token, as the service counts them."""
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What is reported."""

    swap_seconds: list[float]
    kills: dict[str, int]
    """By how."""
    ends: dict[str, int]
    """Of all replies."""
    retries: float
    others: int
    """Whole replies that are not, by their log-probabilities, of the policy that they name from end to end."""
    noticed_seconds: list[float]
    back_seconds: list[float]
    longest_silence_seconds: float
    """Longest time in which no client got a token."""
    first_ms: dict[str, dict[str, float]]
    """From asking to the first token, soon after kills and otherwise."""
    faults: list[str]


def end_of(reply: Reply) -> End:
    """How a reply ended, as its client saw it."""
    if not reply.fault:
        return "whole"
    if not reply.chunk_times:
        return "failed before its first token"
    return "error event" if reply.fault.startswith("{") else "cut silently"


def examine(trial: Trial, scorer: Scorer) -> Figures:
    """All figures of a trial."""
    replies = [read(exchange) for exchange in trial.exchanges]
    whole = [reply for reply in replies if end_of(reply) == "whole"]
    origins = find_origins(whole, scorer)
    begun = [reply for reply in replies if reply.chunk_times]
    felt = [Span(kill.at, kill.at + FELT_SECONDS) for kill in trial.kills]
    soon = [reply for reply in begun if any(reply.began in span for span in felt)]
    others = [reply for reply in begun if not any(reply.began in span for span in felt)]
    return Figures(
        swap_seconds=trial.swap_seconds,
        kills=dict(Counter(kill.how for kill in trial.kills)),
        ends=dict(Counter(end_of(reply) for reply in replies)),
        retries=trial.retries,
        others=sum({origin.whole} != reply.labels for origin, reply in zip(origins, whole, strict=True)),
        noticed_seconds=[kill.noticed_seconds for kill in trial.kills],
        back_seconds=[kill.back_seconds for kill in trial.kills],
        longest_silence_seconds=longest_silence(begun, [Span(0.0, trial.ended)]),
        first_ms={"within 5 s of a kill": _waits(soon), "otherwise": _waits(others)},
        faults=sorted({reply.fault for reply in replies if reply.fault})[:MOST_SHOWN],
    )


def _waits(replies: Sequence[Reply]) -> dict[str, float]:
    ms = [1000 * (reply.first_at - reply.began) for reply in replies]
    return {"num": len(ms), "p50": percentile(ms, 50), "p99": percentile(ms, 99)} if ms else {"num": 0}


def report(figures: Figures) -> str:
    """Tables for people."""
    rows = [
        ["kills: " + ", ".join(f"{how} {num}" for how, num in sorted(figures.kills.items()))],
        [
            f"swaps: {len(figures.swap_seconds)}; all replicas hold it after s, median and longest",
            _median_and_longest(figures.swap_seconds),
        ],
        *([f"replies: {end}", str(num)] for end, num in sorted(figures.ends.items())),
        ["requests that another replica took up", f"{figures.retries:g}"],
        ["noticed after s, median and longest", _median_and_longest(figures.noticed_seconds)],
        ["verified again after s, median and longest", _median_and_longest(figures.back_seconds)],
        ["longest time without any token, s", f"{figures.longest_silence_seconds:.2f}"],
        *(
            [f"first token {when}, ms p50, p99", f"{waits['p50']:.0f}, {waits['p99']:.0f}"]
            for when, waits in figures.first_ms.items()
            if waits["num"]
        ),
    ]
    rows[0].append(str(sum(figures.kills.values())))
    faults = "\n".join(f"- {fault}" for fault in figures.faults)
    return (
        table(["two replicas, swapped and killed under load", ""], rows)
        + "\n\nWhat clients were told:\n\n"
        + (faults or "nothing")
    )


def _median_and_longest(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.1f}, {max(seconds):.1f}" if seconds else "none"


def goals(figures: Figures) -> list[Goal]:
    """No reply that had begun is cut silently, and all others succeed."""
    counted: tuple[tuple[str, int], ...] = (
        ("replies cut silently", figures.ends.get("cut silently", 0)),
        (
            "requests that failed before their first token",
            figures.ends.get("failed before its first token", 0),
        ),
        ("whole replies of another policy", figures.others),
    )
    return [Goal(name, "0", str(num), num == 0) for name, num in counted]
