"""When a request is shown two replies, in which order, and when they are worth a vote. Pure: the caller brings chance."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from random import Random
from typing import Literal

Mode = Literal["never", "auto", "always"]
Reason = Literal["auto", "evaluation", "always", "labeler"]
NEARLY = 0.95
"""Share of words in common, in order, from which on two replies count as the same."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """Why two replies are shown, and the probability (0, 1] with which this request was."""

    reason: Reason
    propensity: float


@dataclass(frozen=True, slots=True)
class Rates:
    """How often `auto` shows two."""

    base: float
    """Share of all requests, for users below their cap."""
    evaluation: float
    """Share that is shown two whatever the cap says: a uniform sample, for estimates that the cap cannot bias."""


def draw(rates: Rates, chance: Random) -> Literal["auto", "evaluation"] | None:
    """Which of the two draws an `auto` request won, before anything is known of its user."""
    if chance.random() < rates.evaluation:
        return "evaluation"
    return "auto" if chance.random() < rates.base else None


def pair(
    drawn: Literal["auto", "evaluation"], rates: Rates, *, opted_out: bool, capped: bool
) -> Pairing | None:
    """The pairing for a user, or None. Opting out always counts; the cap only for the base rate."""
    if opted_out or (capped and drawn == "auto"):
        return None
    return Pairing(drawn, rates.evaluation + (0.0 if capped else (1 - rates.evaluation) * rates.base))


def shown_order(count: int, chance: Random) -> list[int]:
    """A random order: element i is the position at which the engine's reply i is shown."""
    positions = list(range(count))
    chance.shuffle(positions)
    return positions


@dataclass(frozen=True, slots=True)
class Objection:
    """Why replies are not worth a vote."""

    code: Literal["comparison_running", "comparison_failed", "comparison_cut_off", "replies_alike"]
    message: str


def objection(replies: Sequence[tuple[str | None, str | None]]) -> Objection | None:
    """Why a vote between these replies would say nothing; None where it says something.

    replies: text and finish reason of each, in any order; a finish reason of None: it still runs.
    """
    reasons = {reason for _, reason in replies}
    if None in reasons:
        return Objection("comparison_running", "All replies must have ended before the vote.")
    if reasons - {"stop", "length"}:
        return Objection("comparison_failed", "One of the replies failed, so they cannot be compared.")
    if "length" in reasons:
        return Objection("comparison_cut_off", "One of the replies was cut off, so they cannot be compared.")
    texts = [words(text or "") for text, _ in replies]
    if all(alike(texts[0], other) for other in texts[1:]):
        return Objection("replies_alike", "The replies are the same, or nearly: there is nothing to choose.")
    return None


def words(text: str) -> list[str]:
    """What of a text is said, without case and punctuation; the text itself where that leaves nothing."""
    return re.findall(r"\w+", text.casefold()) or [text.strip()]


def alike(one: list[str], other: list[str]) -> bool:
    """Whether two lists of words say the same, or nearly."""
    if one == other:
        return True
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    # The first two are upper bounds of the third, and cheap.
    return (
        matcher.real_quick_ratio() >= NEARLY and matcher.quick_ratio() >= NEARLY and matcher.ratio() >= NEARLY
    )
