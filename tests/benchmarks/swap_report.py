"""From what clients received to figures and tables in Markdown. Used by `swap.py`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from tests.benchmarks.gateway_report import Goal, show, table
from tests.benchmarks.gateway_samples import Spread, percentile
from tests.benchmarks.swap_clients import NUM_CLIENTS, Exchange
from tests.benchmarks.swap_policies import Scorer, find_origins
from tests.benchmarks.swap_replies import (
    Origin,
    Reply,
    Span,
    Swap,
    gaps_within,
    last_old,
    longest_silence,
    read,
    waits_within,
)

RATIO = 1.2
"""Goal: p99 of the gaps with swaps, over that without."""
LAST_SECONDS = 1.0
"""Goal: from the call to the last new reply on the old policy."""
MOST_FAULTS = 5


@dataclass(slots=True)
class Trial:
    """What clients received while one way of swapping was tried, in turns without swaps and with. The n-th of both are a pair."""

    name: str
    exchanges: list[Exchange]
    labelled: bool
    """Whether replies name their policy."""
    quiet: list[Span] = field(default_factory=list)
    swapping: list[Span] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Times:
    """Some times, in milliseconds."""

    num: int
    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        ms = [1000 * each for each in seconds]
        return cls(len(ms), percentile(ms, 50), percentile(ms, 99), max(ms))


@dataclass(frozen=True, slots=True)
class Figures:
    """One trial."""

    name: str
    num_swaps: int
    replies: int
    in_flight: int
    """Replies that were under way at the moment of some swap."""
    failed: int
    cut_off: int
    """Of those that failed: in the middle of the reply. The others were refused."""
    faults: dict[str, int]
    mixed: int
    """Whole replies whose tokens are not all of one policy, by their log-probabilities."""
    mislabelled: int | None
    """Whole replies of another policy than the one that they name; None where they name none."""
    quiet: Times
    """Between one chunk of a reply and the next, without swaps."""
    swapping: Times
    """With them."""
    quiet_waits: Times
    """From asking to the first token, without swaps."""
    swapping_waits: Times
    ratio: Spread
    """Of the p99 of each pair of turns."""
    silence_seconds: float
    """The longest time in which no client got a token, with swaps."""
    last_old_seconds: dict[str, list[float]]
    """By kind of swap: from the call to the first token of the last new reply on the old policy."""
    last_asked_seconds: dict[str, list[float]]
    """By kind of swap: from the call to the request of the last reply on the old policy that was asked for after it."""
    took_seconds: dict[str, list[float]]
    """By kind of swap: all of it."""
    call_seconds: dict[str, list[float]]
    """By kind of swap: the call that changes the policy alone."""
    worst_deviation: float
    """Nats a token, of the worst window of any reply that is of one policy, from that policy."""
    compared: int
    """Replies that were compared with further policies."""
    next_deviation: float
    """Nats a token, the least of any reply of one policy from any other policy."""

    @property
    def pooled_ratio(self) -> float:
        return self.swapping.p99 / self.quiet.p99


def examine(trial: Trial, scorer: Scorer) -> Figures:
    """Everything that ended once measuring had begun."""
    began = trial.quiet[0].began
    replies = [read(exchange) for exchange in trial.exchanges]
    replies = [reply for reply in replies if reply.ended >= began]
    failed = [reply for reply in replies if reply.fault]
    whole = [reply for reply in replies if not reply.fault]
    origins = find_origins(whole, scorer)
    known, until = list(zip(whole, origins, strict=True)), trial.swapping[-1].ended
    pure = [each for each in origins if each.whole is not None]
    next_deviations = [each.next_deviation for each in pure if each.next_deviation is not None]
    return Figures(
        name=trial.name,
        num_swaps=len(trial.swaps),
        replies=len(replies),
        in_flight=sum(
            any(swap.ended > r.began and swap.called < r.ended for swap in trial.swaps) for r in replies
        ),
        failed=len(failed),
        cut_off=sum(bool(reply.token_ids) for reply in failed),
        faults=dict(Counter(reply.fault[:120] for reply in failed).most_common(MOST_FAULTS)),
        mixed=len(origins) - len(pure),
        mislabelled=_count_mislabelled(whole, origins) if trial.labelled else None,
        quiet=Times.of(gaps_within(replies, trial.quiet)),
        swapping=Times.of(gaps_within(replies, trial.swapping)),
        quiet_waits=Times.of(waits_within(replies, trial.quiet)),
        swapping_waits=Times.of(waits_within(replies, trial.swapping)),
        ratio=Spread.of(
            [_p99(replies, b) / _p99(replies, a) for a, b in zip(trial.quiet, trial.swapping, strict=True)]
        ),
        silence_seconds=longest_silence(replies, trial.swapping),
        last_old_seconds=_by_kind(
            trial.swaps, last_old(trial.swaps, known, until, lambda reply: reply.first_at)
        ),
        last_asked_seconds=_by_kind(
            trial.swaps, last_old(trial.swaps, known, until, lambda reply: reply.began)
        ),
        took_seconds=_by_kind(trial.swaps, (swap.ended - swap.began for swap in trial.swaps)),
        call_seconds=_by_kind(trial.swaps, (swap.ended - swap.called for swap in trial.swaps)),
        worst_deviation=max(each.deviation for each in pure),
        compared=len(next_deviations),
        next_deviation=min(next_deviations),
    )


def _count_mislabelled(replies: Sequence[Reply], origins: Sequence[Origin]) -> int:
    pairs = zip(replies, origins, strict=True)
    return sum(origin.whole is not None and reply.labels != {origin.whole} for reply, origin in pairs)


def _p99(replies: Sequence[Reply], span: Span) -> float:
    return Times.of(gaps_within(replies, [span])).p99


def _by_kind(swaps: Sequence[Swap], seconds: Iterator[float]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for swap, value in zip(swaps, seconds, strict=True):
        result.setdefault(swap.kind, []).append(value)
    return result


def report(all_figures: Sequence[Figures]) -> str:
    """Four tables: what went wrong, how smoothly it went, how long a swap takes, and how sure the log-probabilities are."""
    return "\n\n".join(
        f"### {title}\n\n{rows(all_figures)}"
        for title, rows in (
            (f"What {NUM_CLIENTS} streaming clients noticed", _faults),
            ("Milliseconds, without swaps -> with", _smoothness),
            ("Seconds of a swap: median, longest", _delays),
            ("Log-probabilities, nats a token", _certainty),
        )
    )


def _faults(all_figures: Sequence[Figures]) -> str:
    head = ["", "swaps", "replies (under way at a swap)", "failed (midway)", "mixing policies"]
    head += ["naming another policy", "longest time without any token, s"]
    return table(
        head,
        [
            [
                each.name,
                str(each.num_swaps),
                f"{each.replies:,} ({each.in_flight:,})",
                f"{each.failed:,} ({each.cut_off:,})",
                str(each.mixed),
                "-" if each.mislabelled is None else str(each.mislabelled),
                f"{each.silence_seconds:.2f}",
            ]
            for each in all_figures
        ],
    )


def _smoothness(all_figures: Sequence[Figures]) -> str:
    head = ["", "between chunks: p50", "p99", "longest", "ratio of p99", "by pair of turns"]
    head += ["to the first token: p50", "p99"]
    rows = []
    for each in all_figures:
        gaps, waits = (each.quiet, each.swapping), (each.quiet_waits, each.swapping_waits)
        cells = [_change([times.p50 for times in gaps]), _change([times.p99 for times in gaps])]
        cells += [_change([times.longest for times in gaps]), f"{each.pooled_ratio:.2f}", show(each.ratio, 2)]
        cells += [_change([times.p50 for times in waits]), _change([times.p99 for times in waits])]
        rows.append([each.name, *cells])
    return table(head, rows)


def _change(values: Sequence[float]) -> str:
    return " -> ".join(f"{value:,.0f}" for value in values)


def _delays(all_figures: Sequence[Figures]) -> str:
    head = [
        "",
        "from the call to the last new reply on the old policy: its first token",
        "its request",
        "the call",
        "all of it, from publishing",
    ]
    rows = []
    for each in all_figures:
        for kind in each.took_seconds:
            columns = (
                each.last_old_seconds,
                each.last_asked_seconds,
                each.call_seconds,
                each.took_seconds,
            )
            rows.append([kind, *(f"{median(c[kind]):.2f}, {max(c[kind]):.2f}" for c in columns)])
    return table(head, rows)


def _certainty(all_figures: Sequence[Figures]) -> str:
    head = [
        "",
        "worst 8 tokens of any unmixed reply, from its policy",
        "nearest other policy to any unmixed reply",
    ]
    return table(
        head,
        [
            [
                each.name,
                f"{each.worst_deviation:.2f}",
                f"{each.next_deviation:.2f} ({each.compared:,} compared)",
            ]
            for each in all_figures
        ],
    )


def goals(figures: Figures) -> list[Goal]:
    """Of Ratchet's own swaps."""
    last = max(max(values) for values in figures.last_old_seconds.values())
    wrong = figures.mixed + (figures.mislabelled or 0)
    return [
        Goal("failed", "0", str(figures.failed), figures.failed == 0),
        Goal("replies mixing policies, or of another than they name", "0", str(wrong), wrong == 0),
        Goal(
            "p99 gap over that without swaps",
            f"<= {RATIO:g}",
            f"{figures.pooled_ratio:.2f}",
            figures.pooled_ratio <= RATIO,
        ),
        Goal(
            "call to last new reply on the old policy",
            f"<= {LAST_SECONDS:g} s",
            f"{last:.2f} s",
            last <= LAST_SECONDS,
        ),
    ]
