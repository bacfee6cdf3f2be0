"""What the clients of `swap.py` received: replies, the gaps between their chunks, and which policy each token is of.

The last is told by log-probabilities alone. An engine reports one for each token; computed anew, with the policy's own weights and the
same tokens before it, it must be the same but for rounding, and with another policy's weights it is far off. Pure arithmetic.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from statistics import mean
from typing import Any

from tests.benchmarks.swap_clients import Exchange

WINDOW = 8
"""Tokens that are judged together: one alone may be as likely under both policies."""
TOLERANCE = 0.3
"""Nats a token, mean over a window: further off, the window is not of that policy. An engine may compute in bfloat16."""
TOKEN_ID = "token_id:"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time."""

    began: float
    ended: float

    def __contains__(self, moment: float) -> bool:
        return self.began <= moment < self.ended


@dataclass(slots=True)
class Reply:
    """One reply, or what there is of it."""

    prompt: str
    began: float
    """When it was asked for."""
    ended: float
    labels: set[str] = field(default_factory=set)
    """The policies that its chunks name."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """As the engine reported them, one for each token."""
    chunk_times: list[float] = field(default_factory=list)
    """When tokens came; what came at once counts once."""
    finish_reason: str | None = None
    fault: str = ""

    @property
    def first_at(self) -> float:
        """When its first tokens came."""
        return self.chunk_times[0]

    def add(self, event: dict[str, Any]) -> None:
        """What one server-sent event says."""
        if "error" in event:
            self.fault = json.dumps(event["error"])[:300]
            return
        self.labels.add(event["model"])
        for choice in event["choices"]:
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            for token in (choice["logprobs"] or {}).get("content") or []:
                self.token_ids.append(int(token["token"].removeprefix(TOKEN_ID)))
                self.logprobs.append(token["logprob"])


def read(exchange: Exchange) -> Reply:
    """The reply of an exchange. A fault is whatever keeps it from being a whole one."""
    reply = Reply(exchange.prompt, exchange.began, exchange.ended, fault=exchange.fault)
    rest, done = b"", False
    for moment, data in exchange.received:
        *events, rest = (rest + data).split(b"\n\n")
        texts = [event.removeprefix(b"data:").strip() for event in events]
        done = done or b"[DONE]" in texts
        before = len(reply.token_ids)
        for text in texts:
            if text and text != b"[DONE]":
                reply.add(json.loads(text))
        if len(reply.token_ids) > before:
            reply.chunk_times.append(moment)
    if not reply.fault and not done:
        reply.fault = "the stream ended early"
    if not reply.fault and reply.finish_reason not in ("stop", "length"):
        reply.fault = f"it ended by {reply.finish_reason}"
    return reply


def gaps_within(replies: Iterable[Reply], spans: Sequence[Span]) -> list[float]:
    """Seconds between one chunk of a reply and the next, for each next one that came in one of the spans."""
    pairs = chain.from_iterable(pairwise(reply.chunk_times) for reply in replies)
    return [after - before for before, after in pairs if any(after in span for span in spans)]


def waits_within(replies: Iterable[Reply], spans: Sequence[Span]) -> list[float]:
    """Seconds from asking to the first token, for each reply whose first token came in one of the spans."""
    begun = [reply for reply in replies if reply.chunk_times]
    return [reply.first_at - reply.began for reply in begun if any(reply.first_at in span for span in spans)]


def longest_silence(replies: Iterable[Reply], spans: Sequence[Span]) -> float:
    """The longest time in which nobody got a token, seconds, if it ended in one of the spans."""
    moments = sorted(chain.from_iterable(reply.chunk_times for reply in replies))
    return max(after - before for before, after in pairwise(moments) if any(after in span for span in spans))


def windows(deviations: Sequence[float]) -> list[float]:
    """Mean deviation of each `WINDOW` tokens; the last ones are judged with those before them."""
    last = max(len(deviations) - WINDOW, 0)
    return [mean(deviations[start : start + WINDOW]) for start in (*range(0, last, WINDOW), last)]


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose a reply is, by its log-probabilities."""

    first: str | None
    """The policy of its first tokens."""
    whole: str | None
    """The one policy of all its tokens; None: it mixes policies, or is of none."""
    deviation: float
    """Of its worst window, from the policy that it is nearest to: nats a token."""
    next_deviation: float | None
    """Of the whole reply, from the next nearest policy; None where it was compared with one only."""


def origin(deviations: Mapping[str, Sequence[float]]) -> Origin:
    """deviations: for each policy, by how much each token's reported log-probability is off, in nats."""
    by_window = {name: windows(tokens) for name, tokens in deviations.items()}
    nearest, *others = sorted(deviations, key=lambda name: mean(deviations[name]))
    starts = min(by_window, key=lambda name: by_window[name][0])
    return Origin(
        first=starts if by_window[starts][0] <= TOLERANCE else None,
        whole=nearest if max(by_window[nearest]) <= TOLERANCE else None,
        deviation=max(by_window[nearest]),
        next_deviation=mean(deviations[others[0]]) if others else None,
    )


@dataclass(frozen=True, slots=True)
class Swap:
    """One change of the policy that answers. Times are `perf_counter`'s."""

    kind: str
    old: str
    new: str
    began: float
    """Of all work on it: a promotion begins with the publishing."""
    called: float
    """The call that is to change the policy."""
    ended: float
    """Its answer."""


def last_old(
    swaps: Sequence[Swap],
    replies: Sequence[tuple[Reply, Origin]],
    until: float,
    moment: Callable[[Reply], float],
) -> Iterator[float]:
    """For each swap, seconds from its call to the `moment` of the last reply that began on the old policy; 0: to none.

    A later swap may bring the old policy back: a swap's time ends with the next one's call, that of the last one with `until`.
    """
    ends = [*(swap.called for swap in swaps[1:]), until]
    for swap, end in zip(swaps, ends, strict=True):
        span = Span(swap.called, end)
        moments = [moment(reply) for reply, origin in replies if origin.first == swap.old]
        yield max((each - swap.called for each in moments if each in span), default=0.0)
