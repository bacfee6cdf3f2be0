"""The gate: what a policy must show offline before users meet it. Every check has a number, a threshold and a verdict.

Candidate and live policy answer the same prompts (held-out votes' prompts and the guard set), and are compared on them. Right
answers to the guard set must not fall: below live's by no more than chance explains, and below the anchor's not at all, so that
many small falls cannot add up.

A new anchor, made from demonstrations, passes the same gate but for two checks: by the judge it must only not lose, since it was not
trained on votes; and KL to the old anchor is no budget of its, since KL begins anew with it. Instead it must find demonstrations
likelier that training has not seen.

Legend: N replies to held-out prompts, G guard prompts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor

from trainer.features import read_features
from trainer.guard import Guard
from trainer.iterations import Guarded
from trainer.models import POLICY, REFERENCE, Roles
from trainer.ppo_math import kl_k3
from trainer.preferences import Pair
from trainer.repetition import repeats
from trainer.reward_model import Head
from trainer.rollouts import Rollout, Sampler

NUM_SHOWN = 10
NUM_ANSWERS = 256
"""Replies to the held-out prompts, at least, that a policy is judged by."""
GUARD_DRAWS = 4
"""Replies to each guard prompt: right answers and faults are shares, and a share of few replies says little."""
WATCHED = 64
"""Guard prompts that are asked in each iteration of training."""
ONE_SIDED_95 = 1.64
"""Standard errors."""
JUDGE = "judge"
"""Name of the check that a policy has gained something."""


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

    @property
    def gains_too_little(self) -> bool:
        """Whether it fails for want of a gain, and for nothing else: nearer to live, it would gain less."""
        return [check.name for check in self.checks if not check.passed] == [JUDGE]

    def as_dict(self) -> dict[str, object]:
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True, slots=True)
class Sample:
    """What one policy answered to the gate's prompts."""

    judged: Tensor
    """[N] by the judge; [0] without one."""
    right: Tensor
    """[G] share of right replies to each guard prompt."""
    kl: float
    """To the anchor, nats per reply (k3)."""
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


class Examination:
    """Prompts and a judge, the same for every policy that is compared.

    Made while the policy in `roles` is the live one, which is asked then, as the anchor is: `live`, and `anchor_right`, [G] share of
    its right replies to each guard prompt.
    """

    def __init__(
        self,
        roles: Roles,
        judge: Head | None,
        sampler: Sampler,
        prompts: Sequence[list[int]],
        held_out: Sequence[Pair],
        guards: Sequence[Guard],
        seed: int,
    ) -> None:
        """sampler: as users are answered. held_out: votes, of which it is told how far a policy agrees with them."""
        self._roles = roles
        self._judge = judge
        self._sampler = sampler
        self._prompts = [*prompts] * math.ceil(NUM_ANSWERS / max(1, len(prompts)))
        self._decided = [pair for pair in held_out if pair.decided]
        self._guards = guards
        self._seed = seed
        self.live = self.ask()
        with roles.acting_as(REFERENCE):
            guarded = self._answer_guards()
        self.anchor_right = _shares_right(guards, [roles.decode(rollout.reply_ids) for rollout in guarded])

    def ask(self) -> Sample:
        """The policy that `roles` hold now: at least `NUM_ANSWERS` replies to the prompts, `GUARD_DRAWS` to each guard prompt."""
        roles = self._roles
        with roles.acting_as(POLICY):
            rollouts = self._sample(self._prompts, self._seed)
            guarded = self._answer_guards()
        everything = [*rollouts, *guarded]
        texts = [roles.decode(rollout.reply_ids) for rollout in everything]
        features = read_features(roles, [(rollout.prompt_ids, rollout.reply_ids) for rollout in rollouts])
        return Sample(
            judged=self._judge(features).mean(1) if self._judge else torch.zeros(0),
            right=_shares_right(self._guards, texts[len(rollouts) :]),
            kl=measure_kl(roles, rollouts),
            ended=sum(rollout.ended for rollout in everything) / len(everything),
            repeated=sum(map(repeats, texts)) / len(texts),
            length=sum(len(rollout.reply_ids) for rollout in everything) / len(everything),
            shown=[
                (guard.messages[-1]["content"], text)
                for guard, text in zip(self._guards[:NUM_SHOWN], texts[len(rollouts) :], strict=False)
            ],
            preference=_preference(roles, self._decided),
        )

    def compare(self, candidate: Sample, chosen_length: float, kl_budget: float) -> Verdict:
        """What `decide` says of the policy that `roles` hold now. candidate: what it answered."""
        finite = self._roles.is_finite()
        return decide(candidate, self.live, self.anchor_right, chosen_length, kl_budget, finite)

    def guard_set(self) -> "GuardSet | None":
        """To be watched in training; None where there are no guard prompts."""
        if not self._guards:
            return None
        return GuardSet(self._roles, self._sampler, self._guards, self.live.right.mean().item(), self._seed)

    def _answer_guards(self) -> list[Rollout]:
        """All guard prompts once, then all again, until each has `GUARD_DRAWS` replies."""
        prompts = [self._roles.prompt_ids(guard.messages) for guard in self._guards]
        return self._sample(prompts * GUARD_DRAWS, self._seed + 1)

    def _sample(self, prompts: Sequence[list[int]], seed: int) -> list[Rollout]:
        """With the same random numbers for whoever answers, so that equal policies say the same."""
        generator = torch.Generator(device=self._roles.device).manual_seed(seed)
        return self._sampler.sample(self._roles.model, prompts, generator)


@dataclass(frozen=True, slots=True)
class GuardSet:
    """Watches the guard set while the policy in `roles` is trained."""

    roles: Roles
    sampler: Sampler
    guards: Sequence[Guard]
    live: float
    """Share that the live policy answers right."""
    seed: int

    def ask(self, number: int) -> Guarded:
        """`WATCHED` prompts, the next ones in each iteration."""
        chosen = [
            self.guards[(number * WATCHED + index) % len(self.guards)]
            for index in range(min(WATCHED, len(self.guards)))
        ]
        generator = torch.Generator(device=self.roles.device).manual_seed(self.seed + number)
        prompts = [self.roles.prompt_ids(guard.messages) for guard in chosen]
        with self.roles.acting_as(POLICY):
            rollouts = self.sampler.sample(self.roles.model, prompts, generator)
        right = [
            guard.passes(self.roles.decode(rollout.reply_ids))
            for guard, rollout in zip(chosen, rollouts, strict=True)
        ]
        return Guarded(sum(right), len(right), self.live)


def _shares_right(guards: Sequence[Guard], texts: Sequence[str]) -> Tensor:
    """[G] of texts in the order of `Examination._answer_guards`."""
    right = [float(guard.passes(text)) for guard, text in zip([*guards] * GUARD_DRAWS, texts, strict=True)]
    return torch.tensor(right).view(GUARD_DRAWS, -1).mean(0)


@torch.no_grad()
def measure_kl(roles: Roles, rollouts: Sequence[Rollout], anchor: Roles | None = None) -> float:
    """Of the policy in `roles`, whose replies these are, to their anchor or another one's: nats per reply (k3)."""
    total = 0.0
    ordered = sorted(rollouts, key=lambda rollout: len(rollout.prompt_ids) + len(rollout.reply_ids))
    for start in range(0, len(ordered), 64):
        sequences = [(rollout.prompt_ids, rollout.reply_ids) for rollout in ordered[start : start + 64]]
        batch = roles.batch(sequences)
        kl = kl_k3(roles.logprobs(batch), (anchor or roles).logprobs(batch, role=REFERENCE))
        total += (kl * batch.reply_mask).sum().item()
    return total / len(rollouts)


def decide(
    candidate: Sample,
    live: Sample,
    anchor_right: Tensor,
    chosen_length: float,
    kl_budget: float,
    finite: bool,
) -> Verdict:
    """Compares candidate and live. anchor_right: as `Examination` has it. chosen_length: mean tokens of the replies that users
    preferred, in all votes.
    """
    gain = _lower_bound(candidate.judged - live.judged)
    checks = [
        _above(JUDGE, gain, 0.0, "gain by the held-out judge, lower 95 % bound"),
        *_kept_up(candidate, live, anchor_right, 2.0 * max(live.length, chosen_length)),
        _at_most("kl", candidate.kl, 1.5 * kl_budget, "KL to the anchor, nats per reply"),
        _is_finite(finite),
    ]
    return Verdict(checks)


def decide_anchor(
    candidate: Sample, live: Sample, anchor_right: Tensor, likelier: Tensor, shown_length: float, finite: bool
) -> Verdict:
    """Compares what demonstrations have made of live with live. anchor_right: [G] by the anchor until now.

    likelier: [D] by how much it finds the reply of each held-out demonstration likelier than live does, nats per token.
    shown_length: mean tokens of these replies, which it may well be as long as.
    """
    checks = [
        _at_least(
            "demonstrations",
            _lower_bound(likelier),
            0.0,
            "gain in log-probability of held-out demonstrations, nats per token, lower 95 % bound",
        )
    ]
    if len(candidate.judged):
        gain = candidate.judged - live.judged
        chance = -ONE_SIDED_95 * _standard_error(gain)
        checks.append(
            _at_least(JUDGE, _mean(gain), chance, "gain by the judge, against none less what chance explains")
        )
    checks += _kept_up(candidate, live, anchor_right, 2.0 * max(live.length, shown_length))
    return Verdict([*checks, _is_finite(finite)])


def _kept_up(candidate: Sample, live: Sample, anchor_right: Tensor, longest: float) -> list[Check]:
    """What no policy may lose, whatever it gains. longest: mean reply length that is let pass."""
    fall = candidate.right - live.right
    slack = ONE_SIDED_95 * _standard_error(fall)
    moved = candidate.preference - live.preference
    agreed = (moved > 0).float()
    agrees = agreed.mean().item() if len(agreed) else 0.5
    return [
        _at_least(
            "votes",
            agrees,
            0.5 - ONE_SIDED_95 * _standard_error(agreed),
            "share of held-out votes that it agrees with more than live does, against half less what chance explains",
        ),
        _at_least(
            "guard",
            _mean(candidate.right),
            _mean(live.right) - slack,
            "share of right answers to the guard set, against live's less what chance explains (95 %)",
        ),
        _at_least(
            "guard_anchor",
            _mean(candidate.right),
            _mean(anchor_right),
            "share of right answers to the guard set, against the anchor's",
        ),
        _at_least("ended", candidate.ended, live.ended - 0.01, "share of replies that end by themselves"),
        _at_most(
            "repeated", candidate.repeated, live.repeated + 0.003, "share of replies that repeat themselves"
        ),
        _at_most("length", candidate.length, longest, "mean reply length, tokens"),
    ]


def _is_finite(finite: bool) -> Check:
    return _at_least("finite", float(finite), 1.0, "whether every weight is a number")


def _mean(values: Tensor) -> float:
    """1.0 of none: without a guard set nothing can fall."""
    return values.mean().item() if len(values) else 1.0


def _standard_error(values: Tensor) -> float:
    """Of the mean; 0.0 of fewer than two."""
    return (values.float().std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


def _lower_bound(values: Tensor) -> float:
    return values.mean().item() - ONE_SIDED_95 * _standard_error(values)


def _at_least(name: str, value: float, threshold: float, meaning: str) -> Check:
    return Check(name, value, threshold, math.isfinite(value) and value >= threshold, meaning)


def _above(name: str, value: float, threshold: float, meaning: str) -> Check:
    return Check(name, value, threshold, math.isfinite(value) and value > threshold, meaning)


def _at_most(name: str, value: float, threshold: float, meaning: str) -> Check:
    return Check(name, value, threshold, math.isfinite(value) and value <= threshold, meaning)


@torch.no_grad()
def _preference(roles: Roles, pairs: Sequence[Pair]) -> Tensor:
    def total(choose: Callable[[Pair], list[int]]) -> Tensor:
        parts = []
        for start in range(0, len(pairs), 64):
            sequences = [(pair.prompt, choose(pair)) for pair in pairs[start : start + 64]]
            parts.append(roles.logprobs(roles.batch(sequences)).sum(1))
        return torch.cat(parts) if parts else torch.zeros(0)

    return total(_chosen) - total(_rejected)


def mean_chosen_length(pairs: Sequence[Pair]) -> float:
    """Tokens of the replies that users preferred; 0.0 where they preferred none."""
    return fmean([len(_chosen(pair)) for pair in pairs if pair.decided] or [0.0])


def _chosen(pair: Pair) -> list[int]:
    return pair.first if pair.label > 0.5 else pair.second


def _rejected(pair: Pair) -> list[int]:
    return pair.second if pair.label > 0.5 else pair.first
