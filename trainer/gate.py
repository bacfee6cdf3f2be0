"""The gate: what a policy must show offline before users meet it. Every check has a number, a threshold and a verdict.

Candidate and live policy answer the same prompts (held-out votes' prompts and the guard set), and are compared on them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from trainer.guard import Guard
from trainer.models import POLICY, Batch, Roles
from trainer.preferences import Pair
from trainer.repetition import repeats
from trainer.reward_model import Head, read_features
from trainer.rollouts import Sampler

NUM_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Check:
    """One number against one threshold."""

    name: str
    value: float
    threshold: float
    passed: bool
    meaning: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks. A policy passes only where each does."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """The checks that failed, in one line; empty where none did."""
        failed = [check for check in self.checks if not check.passed]
        return "; ".join(f"{check.name} {check.value:.3f} (needs {check.threshold:.3f})" for check in failed)

    def as_dict(self) -> dict[str, object]:
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True, slots=True)
class Sample:
    """What one policy answered to the gate's prompts."""

    judged: Tensor
    """[N] by the judge."""
    right: float
    """Share of guard prompts answered right; 1.0 without a guard set."""
    ended: float
    """Share of replies that ended by themselves."""
    repeated: float
    """Share of replies that say a run of four words twice."""
    length: float
    """Mean tokens of a reply."""
    shown: list[tuple[str, str]]
    """The last message of some guard prompts, and the reply: for people to look at. No user's words are among them."""
    preference: Tensor
    """[pairs] log-probability of the chosen held-out reply less that of the rejected one."""


def draw_sample(
    roles: Roles, judge: Head, sampler: Sampler, held_out: Sequence[Pair], guards: Sequence[Guard], seed: int
) -> Sample:
    """Answers of the policy that `roles` holds now, at least 256 to the held-out prompts and one to each guard."""
    generator = torch.Generator(device=roles.device).manual_seed(seed)
    prompts = [pair.prompt for pair in held_out] * math.ceil(256 / max(1, len(held_out)))
    with roles.acting_as(POLICY):
        rollouts = sampler.sample(roles.model, prompts, generator)
        guarded = sampler.sample(
            roles.model, [roles.prompt_ids(guard.messages) for guard in guards], generator
        )
    everything = [*rollouts, *guarded]
    texts = [roles.decode(rollout.reply_ids) for rollout in everything]
    right = [guard.passes(text) for guard, text in zip(guards, texts[len(rollouts) :], strict=True)]
    features = read_features(roles, [(rollout.prompt_ids, rollout.reply_ids) for rollout in rollouts])
    return Sample(
        judged=judge(features).mean(1),
        right=sum(right) / len(right) if right else 1.0,
        ended=sum(rollout.ended for rollout in everything) / len(everything),
        repeated=sum(map(repeats, texts)) / len(texts),
        length=sum(len(rollout.reply_ids) for rollout in everything) / len(everything),
        shown=[
            (guard.messages[-1]["content"], text)
            for guard, text in zip(guards[:NUM_SHOWN], texts[len(rollouts) :], strict=False)
        ],
        preference=_preference(roles, [pair for pair in held_out if pair.decided]),
    )


def decide(candidate: Sample, live: Sample, kl: float, kl_budget: float, finite: bool) -> Verdict:
    """Compares candidate and live. kl: of the candidate to the anchor, nats per reply."""
    gain = (candidate.judged - live.judged).float()
    error = (gain.std() / math.sqrt(len(gain))).item()
    moved = candidate.preference - live.preference
    agrees = (moved > 0).float().mean().item() if len(moved) else 0.5
    checks = [
        _at_least(
            "judge", gain.mean().item() - 1.64 * error, 0.0, "gain by the held-out judge, lower 95 % bound"
        ),
        _at_least("votes", agrees, 0.5, "share of held-out votes that it agrees with more than live does"),
        _at_least("guard", candidate.right, live.right, "share of the guard set answered right"),
        _at_least("ended", candidate.ended, live.ended - 0.01, "share of replies that end by themselves"),
        _at_most(
            "repeated", candidate.repeated, live.repeated + 0.005, "share of replies that repeat themselves"
        ),
        _at_most("length", candidate.length, 2.0 * live.length, "mean reply length, tokens"),
        _at_most("kl", kl, 1.5 * kl_budget, "KL to the anchor, nats per reply"),
        _at_least("finite", float(finite), 1.0, "whether every weight is a number"),
    ]
    return Verdict(checks)


def _at_least(name: str, value: float, threshold: float, meaning: str) -> Check:
    return Check(name, value, threshold, math.isfinite(value) and value >= threshold, meaning)


def _at_most(name: str, value: float, threshold: float, meaning: str) -> Check:
    return Check(name, value, threshold, math.isfinite(value) and value <= threshold, meaning)


@torch.no_grad()
def _preference(roles: Roles, pairs: Sequence[Pair]) -> Tensor:
    def total(choose: Callable[[Pair], list[int]]) -> Tensor:
        parts = []
        for start in range(0, len(pairs), 64):
            sequences = [(pair.prompt, choose(pair)) for pair in pairs[start : start + 64]]
            parts.append(roles.logprobs(Batch.collate(sequences, roles.pad_id, roles.device)).sum(1))
        return torch.cat(parts) if parts else torch.zeros(0)

    chosen = total(lambda pair: pair.first if pair.label > 0.5 else pair.second)
    return chosen - total(lambda pair: pair.second if pair.label > 0.5 else pair.first)
