"""From votes to a better policy: reward model, PPO (or DPO, or ORPO), gate. Knows nothing of the database: `cycle.py` does.

What it measures on the way goes to a `Watch`, which a cycle writes to its row, and a benchmark keeps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trainer import followers, gate, ppo, ppo_run, preference_methods, reward_model, reward_quality, sft
from trainer.features import ask_consensus, read_features
from trainer.fleet_rollouts import FleetSampler
from trainer.guard import Guard
from trainer.iterations import GuardWatch, Iteration, Outcome, checkpoint_path, load_average, mix
from trainer.models import POLICY, REFERENCE, Roles
from trainer.preferences import Preferences, split
from trainer.reward_model import Head
from trainer.rollouts import Rollout, Sampler
from trainer.team import ALONE, Team

MIN_PAIRS = 16
"""Decided votes below which nothing is learnt."""
BAR_LENGTH = 15
"""Characters."""
NARROWINGS = 4
"""Mixtures of the trained weights with live's that the gate is shown where it refuses the trained ones: part of the way back has most
of what was gained and little of what was lost. Each halves what lies between a share that passed and one that did not."""


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


@dataclass(frozen=True, slots=True)
class Rewards:
    """Reward models, and the votes that they were fit on."""

    train: Preferences
    held_out: Preferences
    ensemble: Head
    judge: Head
    """Fit on the held-out votes."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A mixture that the gate was shown, and what it said."""

    share: float
    """Of the trained weights, the rest live's."""
    verdict: gate.Verdict
    samples: list[dict[str, str]]


def learn(
    roles: Roles,
    preferences: Preferences,
    guards: Sequence[Guard],
    recipe: Recipe,
    seed: int,
    checkpoints: Path,
    watch: Watch,
    team: Team = ALONE,
    fleet: FleetSampler | None = None,
) -> Learned:
    """Trains the policy in `roles`, which begins as the live one. Raises TooFewVotes, Refused, Unsound.

    team: led by this process; the others, in `followers.follow`, take part in PPO. fleet: samples PPO's replies, where it can.
    """
    decided = len(preferences.decided)
    if decided < MIN_PAIRS:
        raise TooFewVotes(f"{decided} votes prefer one reply, and {MIN_PAIRS} are needed.")

    watch.enter("reward_model")
    sampler = Sampler(roles.end_ids, recipe.policy.max_tokens, context_tokens=roles.context_tokens)
    rewards = _fit_rewards(roles, preferences, sampler, recipe, seed, watch)

    watch.enter("training")
    served = replace(sampler, min_p=recipe.served_min_p)  # the gate sees what users would see
    held_out = rewards.held_out.pairs
    prompts = [pair.prompt for pair in held_out]
    examination = gate.Examination(roles, rewards.judge, served, prompts, held_out, guards, seed)
    guard = examination.guard_set()
    outcome = _train(
        roles, rewards, preferences.prompts, recipe, seed, checkpoints, watch, guard, team, fleet
    )
    # With every iteration again: an earlier run may have been cut off between one's end and its note.
    iterations = [asdict(iteration) for iteration in outcome.iterations]
    training = {"method": recipe.method, "iterations": iterations, "kept": outcome.kept, "why": outcome.why}
    watch.note(training=training)

    watch.enter("gate")
    began = torch.load(checkpoint_path(checkpoints, 0), weights_only=True)
    trained = load_average(checkpoints, outcome.kept) if outcome.kept else began
    if all(torch.equal(weights, began[name]) for name, weights in trained.items()):
        # Warming up, a first iteration changes nothing.
        raise Refused("The gate refused it: the judge liked none of its policies better than live.")
    chosen_length = gate.mean_chosen_length(preferences.pairs)
    chosen = _show_to_gate(roles, examination, began, trained, chosen_length, recipe.policy.kl_budget)
    told = chosen.verdict.as_dict() | {"iteration": outcome.kept, "share": chosen.share}
    watch.note(gate=told, samples=chosen.samples)
    if not chosen.verdict.passed:
        raise Refused(f"The gate refused it: {chosen.verdict.reason}.")
    roles.load_policy_state(mix(began, trained, chosen.share))
    probes = sample_probes(roles, sampler, preferences.prompts, seed)
    return Learned(outcome.iterations[outcome.kept], rewards.ensemble, rewards.judge, probes)


def _fit_rewards(
    roles: Roles, preferences: Preferences, sampler: Sampler, recipe: Recipe, seed: int, watch: Watch
) -> Rewards:
    """Ensemble and judge, and how good they are. Raises TooFewVotes."""
    parts = split(preferences, recipe.reward.held_out, seed)
    train, held_out = parts.train, parts.held_out
    if not parts.unlike.decided or not held_out.decided:
        prompts_voted = len({source.group for source in preferences.sources})
        raise TooFewVotes(
            f"The votes are on {prompts_voted} prompts: too few to hold some out and learn from the rest."
        )
    roles.consensus = ask_consensus(roles, sampler, preferences.prompts, seed)
    own = anchor_features(roles, sampler, preferences.prompts, seed)
    ensemble = reward_model.fit(roles, train, own, recipe.reward, recipe.reward.members, seed)
    judge = reward_model.fit(roles, held_out, own, recipe.reward, recipe.reward.members, seed)
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
    return Rewards(train, held_out, ensemble, judge)


def _show_to_gate(
    roles: Roles,
    examination: gate.Examination,
    began: dict[str, Tensor],
    trained: dict[str, Tensor],
    chosen_length: float,
    kl_budget: float,
) -> Shown:
    """What passes with most of the trained weights; where nothing does, the trained weights themselves."""
    shown: list[Shown] = []

    def show(share: float) -> gate.Verdict:
        roles.load_policy_state(mix(began, trained, share))
        candidate = examination.ask()
        verdict = examination.compare(candidate, chosen_length, kl_budget)
        shown.append(Shown(share, verdict, side_by_side(examination.live, candidate)))
        return verdict

    share = largest_passing(show)
    return next((each for each in shown if each.share == share), shown[0])


def largest_passing(show: Callable[[float], gate.Verdict]) -> float | None:
    """The largest share that is found to pass: 1.0, else by bisection between it and 0.0. None where none does.

    A share that only gains too little is looked for above, not below.
    """
    verdict = show(1.0)
    if verdict.passed or verdict.gains_too_little:
        return 1.0 if verdict.passed else None
    found, least, most = None, 0.0, 1.0
    for _ in range(NARROWINGS):
        middle = (least + most) / 2
        verdict = show(middle)
        if verdict.passed:
            found = middle
        if verdict.passed or verdict.gains_too_little:
            least = middle
        else:
            most = middle
    return found


def _train(
    roles: Roles,
    rewards: Rewards,
    prompts: list[list[int]],
    recipe: Recipe,
    seed: int,
    checkpoints: Path,
    watch: Watch,
    guard: GuardWatch | None,
    team: Team,
    fleet: FleetSampler | None,
) -> Outcome:
    """By the recipe's method; each measures its iterations alike."""
    ensemble, judge = rewards.ensemble, rewards.judge
    if recipe.method == "ppo":
        total = recipe.policy.iterations
        training = ppo.PPO(roles, ensemble, judge, prompts, recipe.policy, seed, team, fleet)
        with followers.called_to(training):
            return ppo_run.train(
                training, checkpoints, lambda iteration: _show(watch, recipe.method, iteration, total), guard
            )
    assert recipe.method != "sft"
    settings = preference_methods.PreferenceSettings(method=recipe.method)
    run = preference_methods.PreferenceRun(
        roles, ensemble, judge, rewards.train.pairs, prompts, settings, recipe.policy, seed
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
    return read_features(roles, [(r.prompt_ids, r.reply_ids) for r in rollouts])


def sample_probes(roles: Roles, sampler: Sampler, prompts: list[list[int]], seed: int) -> list[Rollout]:
    """A few of the policy's own replies."""
    generator = torch.Generator(device=roles.device).manual_seed(seed)
    with roles.acting_as(POLICY):
        return sampler.sample(roles.model, prompts[:16], generator)


def _show(watch: Watch, method: str, iteration: Iteration, total: int) -> None:
    done = iteration.number + 1
    watch.say(
        f"{method} {bar(done, total)} {done}/{total}  score {iteration.score:+.2f}  "
        f"judge {iteration.judge:+.2f}±{iteration.judge_error:.2f}  KL {iteration.kl:.2f}  "
        f"length {iteration.length:.1f}  ended {iteration.ended:.0%}{_guard_words(iteration)}"
    )
    before = watch.metrics.get("training", {}).get("iterations", [])[: iteration.number]
    iterations = [*before, asdict(iteration)]
    progress = {"stage": "training", "done": done, "total": total}
    watch.note(training={"method": method, "iterations": iterations}, progress=progress)
    several = ("number", "guard", "judges")
    numbers = {name: value for name, value in iterations[-1].items() if name not in several}
    if iteration.guard is not None:
        numbers["guard"] = iteration.guard.num_right / iteration.guard.num_asked
    watch.draw(iteration.number, numbers)


def bar(done: int, total: int) -> str:
    """How much of it is done, for one line: a bar that moves would be lost where the lines of several processes are joined."""
    filled = BAR_LENGTH * done // total
    return "━" * filled + "─" * (BAR_LENGTH - filled)


def _guard_words(iteration: Iteration) -> str:
    guard = iteration.guard
    return f"  guard {guard.num_right}/{guard.num_asked}" if guard else ""
