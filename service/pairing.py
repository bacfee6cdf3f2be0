"""When a request is shown two replies, and in which order. Pure: the caller brings the source of chance."""

from dataclasses import dataclass
from random import Random
from typing import Literal

Mode = Literal["never", "auto", "always"]


@dataclass(frozen=True, slots=True)
class Pairing:
    """Why two replies are shown, and the probability (0, 1] with which this request was."""

    reason: Literal["auto", "always"]
    propensity: float


def decide(mode: Mode, rate: float, chance: Random) -> Pairing | None:
    """Two replies, or None for one. `rate` is the share of `auto` requests that get two."""
    if mode == "always":
        return Pairing("always", 1.0)
    if mode == "auto" and chance.random() < rate:
        return Pairing("auto", rate)
    return None


def shown_order(count: int, chance: Random) -> list[int]:
    """A random order: element i is the position at which the engine's reply i is shown."""
    positions = list(range(count))
    chance.shuffle(positions)
    return positions
