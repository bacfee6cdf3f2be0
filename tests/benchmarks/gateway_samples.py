"""What one visit to one contestant gave, and medians over the rounds. Made by `gateway_mock.py` and `gateway_vllm.py`."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from math import exp, log, sqrt
from statistics import fmean, median, quantiles, stdev
from typing import Literal

import psutil

Kind = Literal["whole", "stream"]
"""An answer in one piece, or streamed."""


@dataclass(frozen=True, slots=True)
class Load:
    """What was asked of a contestant: answers of one kind, so many at once, or (0) at the fixed rate."""

    kind: Kind
    streams: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One contestant under one load in one round."""

    load: Load
    contestant: str
    round: int
    values: dict[str, float]
    latencies_ms: dict[str, list[float]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median over the rounds, and the least and the largest of them."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Mean:
    """The geometric mean of ratios, one a round, and its standard error: of many noisy rounds it tells more than the median."""

    value: float
    error: float

    @classmethod
    def of(cls, ratios: list[float]) -> "Mean":
        logs = [log(ratio) for ratio in ratios]
        value = exp(fmean(logs))
        error = value * stdev(logs) / sqrt(len(logs)) if len(logs) > 1 else float("nan")
        return cls(value, error)


class Samples:
    """All of a run."""

    def __init__(self) -> None:
        self.all: list[Sample] = []

    def values(self, load: Load, contestant: str, name: str) -> list[float]:
        """One value of each round, in the order of the rounds."""
        return [each.values[name] for each in self._of(load, contestant)]

    def spread(self, load: Load, contestant: str, name: str) -> Spread:
        return Spread.of(self.values(load, contestant, name))

    def ratio(self, load: Load, name: str, above: str, below: str) -> Spread:
        """One contestant's value over another's, round by round: what slows a round slows both."""
        return Spread.of(self._ratios(load, name, above, below))

    def mean_ratio(self, load: Load, name: str, above: str, below: str) -> Mean:
        """The same ratios in one number: what many rounds say together."""
        return Mean.of(self._ratios(load, name, above, below))

    def _ratios(self, load: Load, name: str, above: str, below: str) -> list[float]:
        pairs = zip(self.values(load, above, name), self.values(load, below, name), strict=True)
        return [a / b for a, b in pairs]

    def added(self, load: Load, name: str, contestant: str, base: str) -> Spread:
        """What a contestant's value is more than the base's, round by round."""
        pairs = zip(self.values(load, contestant, name), self.values(load, base, name), strict=True)
        return Spread.of([a - b for a, b in pairs])

    def percentile(self, load: Load, contestant: str, name: str, percent: int) -> float:
        """Of all requests of all rounds together: one round alone has too few for a tail."""
        return percentile(
            [ms for each in self._of(load, contestant) for ms in each.latencies_ms[name]], percent
        )

    def _of(self, load: Load, contestant: str) -> Iterable[Sample]:
        found = [each for each in self.all if each.load == load and each.contestant == contestant]
        return sorted(found, key=lambda each: each.round)


def percentile(values: list[float], percent: int) -> float:
    """Interpolated between the two nearest."""
    return quantiles(values, n=100, method="inclusive")[percent - 1]


class Meter:
    """CPU time that processes spend between its first and its last call; `load` is the caller itself."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self.names = ("load", *processes)
        self._processes = processes
        self._readings: list[dict[str, float]] = []

    def __call__(self) -> None:
        own = psutil.Process().cpu_times()  # without children: those are everybody else
        reading = {name: cpu_seconds(process) for name, process in self._processes.items()}
        self._readings.append(reading | {"load": float(own.user + own.system)})

    def seconds(self, name: str) -> float:
        return self._readings[-1][name] - self._readings[0][name]


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process and its children so far, those that have ended included."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it ended just now: its parent has its time already
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
