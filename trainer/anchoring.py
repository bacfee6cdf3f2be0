"""From demonstrations to a new anchor: supervised fine-tuning of the live policy, then the gate. Only an operator asks for it.

An anchor is what later cycles start over from: KL and the guard set's floor are measured to it, and reward models read it. Votes are
not trained on here. So all of them may judge, where there are enough; the demonstrations that training did not see speak for
what it learnt. Knows nothing of the database: `cycle.py` does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from trainer import gate, reward_model, sft
from trainer.features import ask_consensus
from trainer.guard import Guard
from trainer.learning import (
    MIN_PAIRS,
    Recipe,
    Refused,
    Watch,
    anchor_features,
    sample_probes,
    side_by_side,
)
from trainer.models import Roles
from trainer.preferences import Lesson, Preferences
from trainer.reward_model import Head
from trainer.rollouts import Rollout, Sampler

MIN_SHOWN = 16
"""Demonstrations below which nothing is learnt."""


class TooFewDemonstrations(Exception):
    """Nothing can be learnt from these demonstrations."""


@dataclass(frozen=True, slots=True)
class Anchored:
    """A policy that passed the gate; its weights are in the roles that were trained."""

    kept: sft.Epoch
    probes: list[Rollout]
    """A few of its own replies."""


def learn_anchor(
    roles: Roles,
    lesson: Lesson,
    guards: Sequence[Guard],
    recipe: Recipe,
    seed: int,
    checkpoints: Path,
    watch: Watch,
) -> Anchored:
    """Trains the policy in `roles`, which begins as the live one. Raises TooFewDemonstrations, Refused, NonFinite."""
    demonstrations = lesson.demonstrations
    if len(demonstrations) < MIN_SHOWN:
        raise TooFewDemonstrations(
            f"There are {len(demonstrations)} demonstrations, and {MIN_SHOWN} are needed."
        )
    try:
        _, held_out = sft.split(demonstrations, recipe.demonstrations.held_out, seed)
    except ValueError as error:
        raise TooFewDemonstrations(str(error)) from None
    prompts = [each.prompt for each in demonstrations]
    sampler = Sampler(roles.end_ids, recipe.policy.max_tokens, context_tokens=roles.context_tokens)
    served = replace(sampler, min_p=recipe.served_min_p)  # the gate sees what users would see
    taught = {each.source for each in demonstrations}
    votes = lesson.preferences.where(lambda source: source not in taught)  # corrections are trained on
    judge = _fit_judge(roles, votes, sampler, prompts, recipe, seed, watch)

    watch.enter("training")
    shown = [each.prompt for each in held_out]
    examination = gate.Examination(roles, judge, served, shown, votes.pairs, guards, seed)
    before = sft.measure_logprobs(roles, held_out)
    tuned = sft.train(
        roles,
        demonstrations,
        recipe.demonstrations,
        seed,
        checkpoints,
        lambda epoch: _show(watch, epoch, recipe.demonstrations.epochs),
    )
    epochs = [asdict(epoch) for epoch in tuned.epochs]
    watch.note(training={"method": "sft", "epochs": epochs, "kept": tuned.kept, "why": tuned.why})
    if tuned.kept == 0:
        raise Refused("The gate refused it: held-out demonstrations became no likelier.")

    watch.enter("gate")
    lengths = torch.tensor([float(len(each.reply)) for each in held_out])
    candidate, live = examination.ask(), examination.live
    likelier = (sft.measure_logprobs(roles, held_out) - before) / lengths
    verdict = gate.decide_anchor(
        candidate, live, examination.anchor_right, likelier, lengths.mean().item(), roles.is_finite()
    )
    watch.note(gate=verdict.as_dict() | {"epoch": tuned.kept}, samples=side_by_side(live, candidate))
    if not verdict.passed:
        raise Refused(f"The gate refused it: {verdict.reason}.")
    return Anchored(tuned.epochs[tuned.kept], sample_probes(roles, sampler, prompts, seed))


def _fit_judge(
    roles: Roles,
    votes: Preferences,
    sampler: Sampler,
    prompts: Sequence[list[int]],
    recipe: Recipe,
    seed: int,
    watch: Watch,
) -> Head | None:
    """On all votes; None where they are too few to say anything."""
    if len(votes.decided) < MIN_PAIRS:
        return None
    watch.enter("reward_model")
    roles.consensus = ask_consensus(roles, sampler, [*prompts, *votes.prompts], seed)
    own = anchor_features(roles, sampler, prompts, seed)
    return reward_model.fit(roles, votes, own, recipe.reward, 1, seed)


def _show(watch: Watch, epoch: sft.Epoch, total: int) -> None:
    watch.say(f"sft {epoch.number}/{total}  held-out loss {epoch.held_out_loss:.3f}")
    watch.note(progress={"stage": "training", "done": epoch.number, "total": total})
    watch.draw(epoch.number, {"held_out_loss": epoch.held_out_loss})
