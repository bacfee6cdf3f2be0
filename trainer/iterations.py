"""What is measured while a policy is trained, whatever the method; when a run should end, and which of its policies is kept.

The held-out judge and the guard set each have a veto, since neither is trained on: the judge says where over-optimisation begins, the
guard set where the policy forgets. Both are noisy, so that the last policy is kept which neither calls worse. The judge alone ends
a run: what large steps forget, the smaller ones after them find again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any, Protocol

import torch
from torch import Tensor

PATIENCE = 5
"""Iterations in a row that must be called worse before a run ends."""
OBJECTION = 2.0
"""Standard errors below live at which the guard set calls a policy worse."""
JUDGE_OBJECTION = 3.0
"""Standard errors below the best at which the judge calls a policy worse: of the difference, by which replies were drawn and by which
votes the judge was fit on. The best of thirty draws is flattered by two of its own."""
POOLED = 5
"""Iterations whose guard replies are counted together."""
AVERAGED = 10
"""Iterations whose weights are averaged, though never more than the last half of a run."""
ALL_DONE = "all iterations were done"


class Unsound(RuntimeError):
    """Training cannot go on, which all of its processes find at once. The cycle ends; the live policy stays."""


class NonFinite(Unsound):
    """A loss was not a number."""


class GapTooWide(Unsound):
    """Replies were not drawn from the policy that is to learn from them."""


class GuardWatch(Protocol):
    """Asks the policy that is being trained some of the guard set."""

    def ask(self, number: int) -> "Guarded":
        """Before the iteration of that number: other prompts each time, the same ones again if it is taken up again."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """Some replies to the guard set."""

    num_right: int
    num_asked: int
    live: float
    """Share that the live policy answers right."""


def guarded(watch: GuardWatch | None, number: int) -> Guarded | None:
    """None without a guard set."""
    return watch.ask(number) if watch else None


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration measured, on the rollouts of the policy that it began with."""

    number: int
    score: float
    """Mean pessimistic ensemble score, in standard deviations over the anchor's replies."""
    judge: float
    """Mean score by the judge, in its own standard deviations over the anchor's replies."""
    judge_error: float
    """Standard error of `judge`, by which replies were drawn."""
    disagreement: float
    kl: float
    """To the anchor: nats per reply (k3)."""
    kl_coefficient: float
    entropy: float
    """Mean -log-probability per sampled token, nats."""
    length: float
    """Mean reply length in tokens."""
    ended: float
    """Share of replies that ended by themselves."""
    repeated: float
    """Share of replies that say a run of words twice."""
    clipped: float
    """Share of tokens whose update was clipped."""
    value_explained: float
    """1 - Var(return - value) / Var(return)."""
    guard: Guarded | None = None
    """Right replies to some of the guard set; None without one."""
    passes: int = 0
    """Over the rollouts; 0 where an earlier release did not count them, and by methods that have none."""
    gap: float = 0.0
    """Mean absolute difference between sampler's and trainer's log-probabilities, nats per token; 0.0 where an earlier release did not
    measure it."""
    judges: tuple[float, ...] = ()
    """`judge` by each of its heads, each fit on a bootstrap of the held-out votes; empty where an earlier release had one alone."""

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Iteration":
        """Of `dataclasses.asdict`."""
        guard = values.get("guard")
        told = {"guard": Guarded(**guard) if guard else None, "judges": tuple(values.get("judges", ()))}
        return Iteration(**values | told)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run."""

    iterations: list[Iteration]
    kept: int
    """The iteration whose starting weights were kept."""
    why: str
    """Why the run ended where it did."""


def choose_kept(iterations: Sequence[Iteration]) -> int:
    """The last iteration that neither the guard set calls worse than live, nor the judge worse than the best; else the first."""
    knowing = [each for each in iterations if not forgets(iterations[: each.number + 1])]
    return last_liked(knowing) if knowing else 0


def last_liked(iterations: Sequence[Iteration]) -> int:
    """The last iteration that the judge does not call worse than the best."""
    best = max(iterations, key=lambda iteration: iteration.judge)
    return max(each.number for each in iterations if not _is_worse(each, best))


def _is_worse(one: Iteration, best: Iteration) -> bool:
    """By the judge, and by more than chance: other replies, and other held-out votes, might have said otherwise."""
    # Not strict: one of the two may be an earlier release's, which has no heads.
    heads = [high - low for high, low in zip(best.judges, one.judges, strict=False)]
    by_votes = stdev(heads) if len(heads) > 1 else 0.0
    error = math.hypot(best.judge_error, one.judge_error, by_votes)
    return best.judge - one.judge > JUDGE_OBJECTION * error


def forgets(iterations: Sequence[Iteration]) -> bool:
    """Whether the last iterations answered less of the guard set right than live does, and by more than chance."""
    pooled = [iteration.guard for iteration in iterations[-POOLED:] if iteration.guard is not None]
    if len(pooled) < POOLED:
        return False
    num_asked = sum(guard.num_asked for guard in pooled)
    share = sum(guard.num_right for guard in pooled) / num_asked
    live = pooled[-1].live
    return share < live - OBJECTION * math.sqrt(live * (1 - live) / num_asked)


def objection(iterations: Sequence[Iteration]) -> str | None:
    """Why the run should end here, if it should."""
    if not iterations or iterations[-1].number - last_liked(iterations) < PATIENCE:
        return None
    return f"the held-out judge called {PATIENCE} iterations in a row worse than the best"


def checkpoint_path(checkpoints: Path, number: int) -> Path:
    """Where the policy's weights before that iteration are."""
    return checkpoints / f"{number:03d}.pt"


def averaged(number: int) -> range:
    """The iterations that `load_average` averages."""
    return range(number - min(AVERAGED, math.ceil(number / 2)) + 1, number + 1)


def prune(checkpoints: Path, kept: int) -> None:
    """Removes weights that are needed no more: whatever comes, `choose_kept` never goes back behind what it kept once.

    (Whether the guard set objects to an iteration is settled with it, and a new best is itself liked, and later.) The first stay.
    """
    for number in range(1, averaged(kept).start):
        checkpoint_path(checkpoints, number).unlink(missing_ok=True)


def load_average(checkpoints: Path, number: int) -> dict[str, Tensor]:
    """The mean of the policy's weights before iterations up to that one: what noise there is in the last steps cancels.

    Source: arXiv:2406.16768 (averaged policies get more reward for the same KL).
    """
    # Mapped, not read: they are looked at one weight at a time, and ten whole models are many.
    states = [
        torch.load(checkpoint_path(checkpoints, each), weights_only=True, mmap=True)
        for each in averaged(number)
    ]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def mix(began: dict[str, Tensor], trained: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """`share` of the way from one policy's weights to another's.

    Source: arXiv:2406.16768 (interpolation towards where training began has more reward for its KL than an earlier iteration).
    """
    return {name: began[name] + share * (weights - began[name]) for name, weights in trained.items()}


def save(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)
