"""From votes to a better policy: reward model, PPO (or DPO, or ORPO), gate. Knows nothing of the database: `cycle.py` does.

What it measures on the way goes to a `Watch`, which a cycle writes to its row, and a benchmark keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trainer import followers, gate, ppo, preference_methods, reward_model, reward_quality, sft
from trainer.guard import Guard
from trainer.iterations import GuardWatch, Iteration, Outcome, checkpoint_path, load_average, mix
from trainer.models import POLICY, REFERENCE, Roles
from trainer.preferences import Pair, Preferences, split
from trainer.reward_model import Head
from trainer.rollouts import Rollout, Sampler
from trainer.team import ALONE, Team

MIN_PAIRS = 16
"""Decided votes below which nothing is learnt."""
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of the trained weights in what the gate is shown, the rest live's: the first mixture that passes is taken. Part of the way back has
most of what was gained and little of what was lost."""


class TooFewVotes(Exception):
    """Nothing can be learnt from these votes."""


class Refused(Exception):
    """The gate refused the policy, or there was nothing to show it."""


class Watch(Protocol):
    """Who wants to know how it goes."""

    metrics: dict[str, Any]
    """All that has been noted, by name."""

    def enter(self, stage: str) -> None:
        """A stage begins."""

    def note(self, **metrics: Any) -> None:
        """Something was measured."""

    def say(self, line: str) -> None:
        """One line for people."""

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that change from iteration to iteration."""


Method = Literal["ppo", "dpo", "orpo", "sft"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a policy is learnt. One default for every model, taste and seed."""

    method: Method = "ppo"
    """`sft` is not `learn`'s: see `anchoring.py`."""
    policy: ppo.PPOSettings = field(default_factory=ppo.PPOSettings)
    """Also says how replies are sampled and scored, whatever the method."""
    reward: reward_model.RewardSettings = field(default_factory=reward_model.RewardSettings)
    demonstrations: sft.SFTSettings = field(default_factory=sft.SFTSettings)
    served_min_p: float = 0.02
    """How replies are sampled for users; the gate looks at such."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A policy that passed the gate; its weights are in the roles that were trained."""

    kept: Iteration
    ensemble: Head
    judge: Head
    probes: list[Rollout]
    """A few of its own replies."""


def learn(
    roles: Roles,
    preferences: Preferences,
    guards: Sequence[Guard],
    recipe: Recipe,
    seed: int,
    checkpoints: Path,
    watch: Watch,
    team: Team = ALONE,
) -> Learned:
    """Trains the policy in `roles`, which begins as the live one. Raises TooFewVotes, Refused, NonFinite.

    team: led by this process; the others, in `followers.follow`, take part in PPO.
    """
    decided = len(preferences.decided)
    if decided < MIN_PAIRS:
        raise TooFewVotes(f"{decided} votes prefer one reply, and {MIN_PAIRS} are needed.")

    watch.enter("reward_model")
    parts = split(preferences, recipe.reward.held_out, seed)
    train, held_out = parts.train, parts.held_out
    if not parts.unlike.decided or not held_out.decided:
        prompts_voted = len({source.group for source in preferences.sources})
        raise TooFewVotes(
            f"The votes are on {prompts_voted} prompts: too few to hold some out and learn from the rest."
        )
    prompts = preferences.prompts
    sampler = Sampler(roles.end_ids, recipe.policy.max_tokens, context_tokens=roles.context_tokens)
    own = anchor_features(roles, sampler, prompts, seed)
    ensemble = reward_model.fit(roles, train, own, recipe.reward, recipe.reward.members, seed)
    judge = reward_model.fit(roles, held_out, own, recipe.reward, 1, seed)
    strict = ensemble
    if parts.unlike is not train:
        strict = reward_model.fit(roles, parts.unlike, own, recipe.reward, recipe.reward.members, seed)
    watch.note(
        reward_model=asdict(reward_quality.measure(roles, strict, held_out.pairs))
        | {
            "judge_accuracy": asdict(reward_quality.measure(roles, judge, train.pairs).accuracy),
            "held_out_by": parts.by,
            "train_pairs": len(train.pairs),
            "held_out_pairs": len(held_out.pairs),
            "disliked": len(preferences.dislikes),
        }
    )

    watch.enter("training")
    served = replace(sampler, min_p=recipe.served_min_p)  # the gate sees what users would see
    shown = [pair.prompt for pair in held_out.pairs]
    live = gate.draw_sample(roles, judge, served, shown, held_out.pairs, guards, seed)
    anchor_right = gate.draw_anchor_right(roles, served, guards, seed)
    guard = gate.GuardSet(roles, served, guards, live.right.mean().item(), seed) if guards else None
    outcome = _train(
        roles, ensemble, judge, prompts, train.pairs, recipe, seed, checkpoints, watch, guard, team
    )
    # With every iteration again: an earlier run may have been cut off between one's end and its note.
    iterations = [asdict(iteration) for iteration in outcome.iterations]
    told = {"method": recipe.method, "iterations": iterations, "kept": outcome.kept, "why": outcome.why}
    watch.note(training=told)

    watch.enter("gate")
    verdict = None
    began = torch.load(checkpoint_path(checkpoints, 0), weights_only=True)
    trained = load_average(checkpoints, outcome.kept) if outcome.kept else began
    # Warming up, a first iteration changes nothing.
    changed = not all(torch.equal(weights, began[name]) for name, weights in trained.items())
    for share in SHARES if changed else ():
        state = mix(began, trained, share)
        roles.load_policy_state(state)
        finite = all(bool(weights.isfinite().all()) for weights in state.values())
        candidate = gate.draw_sample(roles, judge, served, shown, held_out.pairs, guards, seed)
        verdict = gate.decide(candidate, live, anchor_right, recipe.policy.kl_budget, finite)
        watch.note(
            gate=verdict.as_dict() | {"iteration": outcome.kept, "share": share},
            samples=side_by_side(live, candidate),
        )
        if verdict.passed:
            kept = outcome.iterations[outcome.kept]
            return Learned(kept, ensemble, judge, sample_probes(roles, sampler, prompts, seed))
    reason = verdict.reason if verdict else "the judge liked none of its policies better than live"
    raise Refused(f"The gate refused it: {reason}.")


def _train(
    roles: Roles,
    ensemble: Head,
    judge: Head,
    prompts: list[list[int]],
    pairs: Sequence[Pair],
    recipe: Recipe,
    seed: int,
    checkpoints: Path,
    watch: Watch,
    guard: GuardWatch | None,
    team: Team,
) -> Outcome:
    """By the recipe's method; each measures its iterations alike."""
    if recipe.method == "ppo":
        total = recipe.policy.iterations
        training = ppo.PPO(roles, ensemble, judge, prompts, recipe.policy, seed, team)
        with followers.called_to(training):
            return ppo.train(
                training, checkpoints, lambda iteration: _show(watch, recipe.method, iteration, total), guard
            )
    assert recipe.method != "sft"
    settings = preference_methods.PreferenceSettings(method=recipe.method)
    run = preference_methods.PreferenceRun(
        roles, ensemble, judge, pairs, prompts, settings, recipe.policy, seed
    )
    return preference_methods.train(
        run, checkpoints, lambda iteration: _show(watch, recipe.method, iteration, settings.iterations), guard
    )


def side_by_side(live: gate.Sample, candidate: gate.Sample) -> list[dict[str, str]]:
    """Their replies to some guard prompts, for people to look at."""
    return [
        {"prompt": prompt, "before": before, "after": after}
        for (prompt, before), (_, after) in zip(live.shown, candidate.shown, strict=True)
    ]


def anchor_features(roles: Roles, sampler: Sampler, prompts: Sequence[list[int]], seed: int) -> Tensor:
    """[NUM_ANSWERS, F] of replies by the anchor, which every score is scaled to."""
    generator = torch.Generator(device=roles.device).manual_seed(seed)
    drawn = [prompts[index % len(prompts)] for index in range(gate.NUM_ANSWERS)]
    with roles.acting_as(REFERENCE):
        rollouts = sampler.sample(roles.model, drawn, generator)
    return reward_model.read_features(roles, [(r.prompt_ids, r.reply_ids) for r in rollouts])


def sample_probes(roles: Roles, sampler: Sampler, prompts: list[list[int]], seed: int) -> list[Rollout]:
    """A few of the policy's own replies."""
    generator = torch.Generator(device=roles.device).manual_seed(seed)
    with roles.acting_as(POLICY):
        return sampler.sample(roles.model, prompts[:16], generator)


def _show(watch: Watch, method: str, iteration: Iteration, total: int) -> None:
    watch.say(
        f"{method} {iteration.number + 1}/{total}  score {iteration.score:+.2f}  "
        f"judge {iteration.judge:+.2f}±{iteration.judge_error:.2f}  KL {iteration.kl:.2f}  "
        f"length {iteration.length:.1f}  ended {iteration.ended:.0%}{_guard_words(iteration)}"
    )
    before = watch.metrics.get("training", {}).get("iterations", [])[: iteration.number]
    iterations = [*before, asdict(iteration)]
    progress = {"stage": "training", "done": iteration.number + 1, "total": total}
    watch.note(training={"method": method, "iterations": iterations}, progress=progress)
    numbers = {name: value for name, value in iterations[-1].items() if name not in ("number", "guard")}
    if iteration.guard is not None:
        numbers["guard"] = iteration.guard.num_right / iteration.guard.num_asked
    watch.draw(iteration.number, numbers)


def _guard_words(iteration: Iteration) -> str:
    guard = iteration.guard
    return f"  guard {guard.num_right}/{guard.num_asked}" if guard else ""
