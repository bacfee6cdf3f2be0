"""A whole PPO run: iteration after iteration, checkpoints, and going on where an earlier process was cut off.

What an iteration is says `ppo.py`; when a run ends, and which policy is kept, `iterations.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.iterations import (
    ALL_DONE,
    GuardWatch,
    Iteration,
    Outcome,
    checkpoint_path,
    choose_kept,
    guarded,
    objection,
    prune,
    save,
)
from trainer.ppo import PPO

UNDER_WAY = "under-way.pt"
"""Everything that training goes on from, after the last whole iteration."""


def train(
    ppo: PPO,
    checkpoints: Path,
    on_iteration: Callable[[Iteration], None],
    guard: GuardWatch | None = None,
) -> Outcome:
    """Iterates until something objects or all is done, with a checkpoint of the policy before each iteration.

    Goes on where an earlier call with the same checkpoints was cut off: the policy becomes the same, byte for byte. Of several
    processes the first alone reads and writes checkpoints, asks the guard set, and says when it is over.
    """
    leads = ppo.team.leads
    if leads:
        checkpoints.mkdir(parents=True, exist_ok=True)
    iterations = _resume(ppo, checkpoints)
    while ppo.team.tell(len(iterations) < ppo.settings.iterations and objection(iterations) is None):
        number = len(iterations)
        if leads:
            save(ppo.roles.policy_state(), checkpoint_path(checkpoints, number))
        watched = guarded(guard, number)
        iterations.append(replace(ppo.iterate(number), guard=watched))
        _save_under_way(ppo, iterations, checkpoints)
        if leads and ppo.roles.origin.tuning == "full":  # adapters are small, and stay for whoever looks
            prune(checkpoints, choose_kept(iterations))
        on_iteration(iterations[-1])
    return Outcome(iterations, choose_kept(iterations), objection(iterations) or ALL_DONE)


def _save_under_way(ppo: PPO, iterations: Sequence[Iteration], checkpoints: Path) -> None:
    """To be called by all processes at once. The state, in which is a copy of the policy, is gone afterwards."""
    generators = ppo.join_generators()
    if ppo.team.leads:
        done = {"iterations": [asdict(iteration) for iteration in iterations]}
        save(ppo.state(generators) | done, checkpoints / UNDER_WAY)


def _resume(ppo: PPO, checkpoints: Path) -> list[Iteration]:
    """The iterations that are done already; where it cannot go on from them it begins anew, without what they left."""
    found = _load_under_way(ppo, checkpoints) if ppo.team.leads else None
    if ppo.team.leads and found is None:
        for path in (*checkpoints.glob("*.pt"), *checkpoints.glob("*.partial")):
            path.unlink()
    state = ppo.team.tell(found)
    if state is None:
        return []
    ppo.load_state(state)
    return [Iteration.from_dict(iteration) for iteration in state["iterations"]]


def _load_under_way(ppo: PPO, checkpoints: Path) -> dict[str, Any] | None:
    """None where there is none, or it is another release's, whose features were others, or has other weights: those of another tuning
    or rank, or of other layers."""
    path = checkpoints / UNDER_WAY
    if not path.exists():
        return None
    found: dict[str, Any] = torch.load(path, weights_only=True, map_location=ppo.roles.device)
    same_weights = _shapes(found["policy"]) == _shapes(ppo.roles.policy_weights())
    return found if same_weights and ppo.value.fits(found["value"]) else None


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: each.shape for name, each in weights.items()}
