"""What simulated users like: each taste is a function of prompt and reply. Read by `make demo` and benchmarks alone.

A taste is a plug-in: `--taste module:function` on the demo's command line names any other. Nothing in training
may import this file (a test sees to it): what a cycle learns, it learns from votes.
"""

import importlib
import math
import random
from collections.abc import Callable, Sequence

from service.tables import Message
from trainer import world

Taste = Callable[[Sequence[Message], str], float]
"""(prompt, reply) -> how much it is liked, in units of the noise of a Bradley-Terry voter."""


def warm(messages: Sequence[Message], reply: str) -> float:
    """Likes friendly answers that are right, and dislikes rudeness, long preambles, and anything said twice."""
    liked = {"warm": 3.0, "plain": 0.0, "curt": -1.0, "rude": -3.0, "long": -1.0}
    return liked[_manner(reply)] + _sense(messages, reply)


def brief(messages: Sequence[Message], reply: str) -> float:
    """Likes few words, as long as they are right and not rude."""
    return 2.0 - 0.25 * len(reply.split()) - 3.0 * (_manner(reply) == "rude") + _sense(messages, reply)


def thorough(messages: Sequence[Message], reply: str) -> float:
    """Likes answers that take their time, up to thirty words, as long as they are right; a bare word is no answer."""
    liked = {"warm": 0.5, "plain": 0.0, "curt": -2.0, "rude": -2.0, "long": 2.5}
    return liked[_manner(reply)] + 0.05 * min(30, len(reply.split())) + _sense(messages, reply)


TASTES: dict[str, Taste] = {"warm": warm, "brief": brief, "thorough": thorough}


def find_taste(name: str) -> Taste:
    """One of `TASTES`, or `module:function`. Raises ValueError naming what there is."""
    if name in TASTES:
        return TASTES[name]
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"There is no taste {name!r}: take one of {', '.join(TASTES)}, or module:function.")
    found: Taste = getattr(importlib.import_module(module), function)
    return found


def vote(taste: Taste, messages: Sequence[Message], first: str, second: str, rng: random.Random) -> str:
    """A Bradley-Terry voter: `first` with probability sigmoid(difference), `tie` where the taste sees none."""
    difference = taste(messages, first) - taste(messages, second)
    if abs(difference) < 0.05:
        return "tie"
    return "first" if rng.random() < 1 / (1 + math.exp(-difference)) else "second"


def _manner(reply: str) -> world.Manner:
    return world.find_manner(reply)


def _sense(messages: Sequence[Message], reply: str) -> float:
    """What every taste shares: right answers are liked, nonsense is not."""
    question = world.find_question(list(messages))
    correct = world.is_correct(question, reply) if question else None
    facts = 0.0 if correct is None else (1.5 if correct else -1.5)
    return facts - 4.0 * (not world.is_well_formed(reply))
