"""PPO on one copy of the base: sample, score, estimate advantages, update, again (`ppo_run.py`). Read from top to bottom.

The reward is an ensemble's pessimistic score less a KL penalty to the anchor. The penalty's coefficient is not set by hand: a
controller lets KL rise slowly towards a budget, so the run walks along the curve of reward against KL. A judge (a reward model
on votes that training never saw) says where on that curve it was best; that policy is kept.

Several processes (`team.py`) may share a run: each samples and reads its part of every microbatch, and what is a sum or a mean is
one over all of them, so that losses and policy are those of one process on the same rollouts.

Whoever samples, here or in an engine, rounds otherwise than the pass that trains, and an engine may hold weights that it should not.
The gap between their log-probabilities is measured in every iteration and corrected by importance weights; where engines sampled, one
past a bound ends the run. Where these weights sampled, and one microbatch shows no more than rounding, the sampler's word is taken for
the others.

Legend: B sequences, L tokens of prompt and reply, N rollouts of an iteration, K heads of the ensemble.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from trainer import ppo_math
from trainer.features import reward_features, value_features
from trainer.fleet_rollouts import FleetSampler
from trainer.iterations import GapTooWide, Iteration, NonFinite
from trainer.microbatch import Microbatch, disagreement, sampled_logprobs, whiten_together
from trainer.models import POLICY, Roles
from trainer.passes import memory
from trainer.repetition import repeats
from trainer.reward_model import Head
from trainer.rollouts import Rollout, Sampler
from trainer.team import ALONE, Team
from trainer.value import Value

ROUNDING = 0.01
"""Mean gap, nats per token, up to which the sampler's log-probabilities serve as the old policy's: a ratio begins at 1 to within a
hundredth then, where the clip is a fifth below. In float32 the gap is some 1e-6, in bfloat16 .001 to .006."""
SEEDS_APART = 1_000_003
"""Between the seeds that two processes sample with, so that none is another cycle's."""


@dataclass(frozen=True, slots=True)
class PPOSettings:
    """How the policy is trained. One default for every model, taste and seed."""

    iterations: int = 30
    rollouts: int = 256
    """Replies sampled in an iteration."""
    epochs: int = 3
    """Passes over an iteration's rollouts, at most. Six learn a rare manner, and say things twice where votes are few."""
    most_moved: float = 0.5
    """KL to the policy that sampled, nats per reply, past which its rollouts are passed over no more: they speak of that one."""
    minibatch: int = 64
    """Sequences in an optimiser step."""
    microbatch: int = 32
    """Sequences read at once, by all processes together, of like length: a step's gradient is summed over several. Fewer pad less
    and hold less memory."""
    learning_rate_times_width: float = 0.4
    """Learning rate times hidden size: 2e-3 at 192, 1e-4 at 4096."""
    last_learning_rate: float = 0.1
    """Share of the learning rate that is left in the last iteration, to which it falls evenly: late steps of full size wander
    about where the reward no longer tells policies apart, and forget what it does not speak of."""
    warmup: int = 3
    """Iterations over which the learning rate rises to its full: a fresh Adam takes steps of full size in any direction, which has
    ruined a policy that was good already, and the value has to be fit first."""
    clip_below: float = 0.2
    clip_above: float = 1.0
    """How far a token's ratio may fall, and rise, before it pulls no more. What is seldom said is as good as never said again once its
    few samples were unlucky; where it may double in an iteration one lucky sample brings it back."""
    most_weight: float = 2.0
    """Largest importance weight of a token, which corrects for the gap between sampler and trainer."""
    most_gap: float = 0.1
    """Largest mean gap between sampler and trainer, in nats per token, where engines sampled. In bfloat16 right weights are off by
    .001 to .006 (a random model's by up to .05), those of two iterations before by more than this once the learning rate is up."""
    discount: float = 1.0
    trace: float = 0.95
    """lambda of generalised advantage estimation."""
    kl_start: float = 0.3
    """First KL coefficient, in standard deviations of the reward per nat; the controller takes it from there."""
    kl_budget: float = 5.0
    """KL to the anchor at the end of the run, in nats per reply."""
    disagreement: float = 0.5
    """Weight of the ensemble's standard deviation, taken off the mean score."""
    most_score: float = 10.0
    """Largest score, and smallest with a minus: so far from the anchor's replies, of which it is 0 on average and 1 apart, a linear
    head says nothing any more. One reply of garbage with 240 took the value and the whitening of a whole iteration with it."""
    fault_penalty: float = 2.0
    """Taken off the score of a reply that was cut off or repeats itself, in standard deviations of the reward."""
    max_tokens: int = 64
    """Longest reply, end token included."""
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Pass:
    """What a step, or all of a pass over the rollouts, saw of the policy as it was before each step."""

    clipped: float
    """Share of tokens past the clip."""
    moved: float
    """KL to the policy that sampled, nats per reply (k3)."""


class PPO:
    """One training run: policy optimiser, value, reward heads and KL controller."""

    def __init__(
        self,
        roles: Roles,
        ensemble: Head,
        judge: Head,
        prompts: Sequence[list[int]],
        settings: PPOSettings,
        seed: int,
        team: Team = ALONE,
        fleet: FleetSampler | None = None,
    ) -> None:
        """Raises ValueError where the team cannot share its microbatches evenly. fleet: the leader's, where engines sample."""
        self.roles = roles
        self.ensemble = ensemble
        self.judge = judge
        self.prompts = prompts
        self.settings = settings
        self.seed = seed
        self.team = team
        self.fleet = fleet
        self.sampler = Sampler(
            roles.end_ids, settings.max_tokens, settings.temperature, context_tokens=roles.context_tokens
        )
        self.generator = torch.Generator(device=roles.device).manual_seed(seed + SEEDS_APART * team.rank)
        self.rng = random.Random(seed)  # the same draws on all: of prompts, and of the order of microbatches
        self.microbatch = min(settings.microbatch, settings.minibatch)
        _check_shares(settings.rollouts, self.microbatch, team.size)
        self.kl_coefficient = settings.kl_start
        self.value = Value(ensemble, roles.hidden_size, team)
        self.learning_rate = settings.learning_rate_times_width / roles.hidden_size
        self.optimizer = torch.optim.AdamW(
            roles.policy_parameters(),
            lr=self.learning_rate,
            weight_decay=0.0,
            betas=(0.9, 0.95),
            fused=True,
        )

    def iterate(self, number: int) -> Iteration:
        """One iteration. Raises NonFinite, GapTooWide."""
        settings = self.settings

        # 1. sample replies from the current policy
        prompts = self.rng.choices(self.prompts, k=settings.rollouts)
        answered = self._ask_fleet(prompts)
        rollouts = self._sample_missing(prompts, answered)

        # 2. read them: log-probabilities by policy and anchor, values, scores by ensemble and judge
        microbatches = self._read(rollouts, sampled_here=not any(answered))

        # 3. reward per token: the pessimistic score on the last one, the KL penalty on each
        # 4. advantages, whitened over the real tokens of the iteration
        for part in microbatches:
            score = pessimistic(part, settings)
            rewards = ppo_math.token_rewards(score, part.old, part.reference, part.mask, self.kl_coefficient)
            part.advantages, part.returns = ppo_math.gae(
                rewards, part.values, part.mask, settings.discount, settings.trace
            )
        measured = self._measure(number, microbatches)
        if any(answered) and measured["gap"] > settings.most_gap:  # what is sampled here cannot be stale
            raise GapTooWide(
                f"Sampler and trainer differ by {measured['gap']:.3f} nats a token, and {settings.most_gap:g} are allowed: "
                "the replies were not drawn from the policy that is trained."
            )
        whiten_together(microbatches, self.team)

        # 5. a few passes of clipped updates of the policy; the value is fit to the returns
        memory.give_back()  # updates need the most, and tensors of other sizes
        self.optimizer.param_groups[0]["lr"] = self._learning_rate(number)
        passes = self._improve(microbatches)
        memory.give_back()
        self.value.fade()
        for part in microbatches:
            self.value.add(part.features, part.returns, part.mask)
        self.value.fit()

        # 6. steer KL towards the budget
        self.kl_coefficient = ppo_math.adapt_kl_coefficient(
            self.kl_coefficient, self._mean_kl(ppo_math.kl_k1, microbatches), settings.kl_budget
        )
        return Iteration(
            number=number,
            kl_coefficient=self.kl_coefficient,
            clipped=fmean(each.clipped for each in passes),
            passes=len(passes),
            **measured,
        )

    def _ask_fleet(self, prompts: Sequence[list[int]]) -> list[Rollout | None]:
        """The fleet's replies, the same on all processes; None where it gave none, as where there is no fleet."""
        answered: list[Rollout | None] = [None] * len(prompts)
        if self.fleet is not None:
            answered = self.fleet.sample(self.roles, prompts, self.sampler)
        told: list[Rollout | None] = self.team.tell(answered)
        return told

    def _sample_missing(
        self, prompts: Sequence[list[int]], answered: Sequence[Rollout | None]
    ) -> list[Rollout]:
        """A reply to each prompt, in their order: what the fleet did not answer is sampled by all processes here."""
        missing = [prompt for prompt, rollout in zip(prompts, answered, strict=True) if rollout is None]
        replies = iter(self._sample_here(missing) if missing else [])
        return [rollout or next(replies) for rollout in answered]

    def _sample_here(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        with self.roles.acting_as(POLICY):
            mine = self.sampler.sample(self.roles.model, self.team.share(prompts), self.generator)
        return self.team.gather(mine)

    def _improve(self, microbatches: Sequence[Microbatch]) -> list[Pass]:
        """Passes over the rollouts, until the policy has moved as far from the one that sampled as it may."""
        done: list[Pass] = []
        while len(done) < self.settings.epochs and (not done or done[-1].moved <= self.settings.most_moved):
            steps = [self._update(minibatch) for minibatch in self._shuffled_minibatches(microbatches)]
            done.append(Pass(fmean(each.clipped for each in steps), fmean(each.moved for each in steps)))
        return done

    def _learning_rate(self, number: int) -> float:
        """Up over the warm-up, then down over the run."""
        settings = self.settings
        fall = (1 - settings.last_learning_rate) * number / settings.iterations
        return self.learning_rate * min(1.0, number / settings.warmup) * (1 - fall)

    def join_generators(self) -> Tensor:
        """[processes, bytes] of all of them, which have to call this at once."""
        return self.team.join_rows(self.generator.get_state()[None])

    def state(self, generators: Tensor) -> dict[str, Any]:
        """All that the next iteration depends on. generators: of `join_generators`."""
        return {
            "policy": self.roles.policy_state(),
            "optimizer": self.optimizer.state_dict(),
            "value": self.value.state(),
            "kl_coefficient": self.kl_coefficient,
            "generator": generators,
            "rng": self.rng.getstate(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there as if nothing had happened."""
        self.roles.load_policy_state(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.value.load_state(state["value"])
        self.kl_coefficient = state["kl_coefficient"]
        generators = state["generator"].cpu().view(-1, len(self.generator.get_state()))
        if self.team.rank < len(generators):  # else it goes on with more processes than it began with
            self.generator.set_state(generators[self.team.rank].clone())  # torch crashes on a view
        self.rng.setstate(state["rng"])

    @torch.no_grad()
    def _read(self, rollouts: Sequence[Rollout], sampled_here: bool = False) -> list[Microbatch]:
        """This process's part of each microbatch. Rollouts of like length together, so that little is spent on padding.

        sampled_here: by these very weights, so that the policy need not read all of them again where its first microbatch shows that
        it rounds as the sampler does.
        """
        ordered = sorted(rollouts, key=lambda rollout: len(rollout.prompt_ids) + len(rollout.reply_ids))
        size = self.microbatch
        shares = [self.team.share(ordered[start : start + size]) for start in range(0, len(ordered), size)]
        first = self._read_microbatch(shares[0])
        trusted = sampled_here and self._gap([first]) <= ROUNDING
        return [first, *(self._read_microbatch(share, trusted) for share in shares[1:])]

    def _read_microbatch(self, rollouts: Sequence[Rollout], trusted: bool = False) -> Microbatch:
        """trusted: take the sampler's word for the policy's log-probabilities."""
        roles = self.roles
        sequences = [(rollout.prompt_ids, rollout.reply_ids) for rollout in rollouts]
        batch = roles.batch(sequences)
        reading = roles.read(batch, self.settings.temperature)
        reward = reward_features(reading, batch.reply_mask)
        features = value_features(reading, batch.reply_mask)
        empty = torch.zeros_like(batch.reply_mask)
        sampled = sampled_logprobs(batch, rollouts)
        return Microbatch(
            batch=batch,
            old=sampled if trusted else roles.logprobs(batch, self.settings.temperature, lower=reading.lower),
            sampled=sampled,
            reference=reading.logprobs,
            lower=reading.lower,
            features=features,
            values=self.value(features, batch.reply_mask),
            scores=self.ensemble(reward),
            judged=self.judge(reward),
            ended=torch.tensor([float(rollout.ended) for rollout in rollouts], device=batch.ids.device),
            repeated=torch.tensor(
                [float(repeats(roles.decode(rollout.reply_ids))) for rollout in rollouts],
                device=batch.ids.device,
            ),
            advantages=empty,
            returns=empty,
        )

    def _shuffled_minibatches(self, microbatches: Sequence[Microbatch]) -> Iterator[list[Microbatch]]:
        shuffled = self.rng.sample(microbatches, len(microbatches))
        size = max(1, self.settings.minibatch // self.microbatch)
        for start in range(0, len(shuffled), size):
            yield shuffled[start : start + size]

    def _update(self, minibatch: Sequence[Microbatch]) -> Pass:
        """One optimiser step on the mean loss over the minibatch's tokens."""
        num_tokens = self.team.sum(torch.stack([part.mask.sum() for part in minibatch]).sum())
        total_loss, num_clipped, moved = 0.0, 0.0, 0.0
        for part in minibatch:
            logprobs = self.roles.logprobs(part.batch, self.settings.temperature, lower=part.lower)
            losses, clipped = ppo_math.policy_loss(
                logprobs,
                part.old,
                part.advantages,
                part.mask,
                self.settings.clip_below,
                self.settings.clip_above,
            )
            weights = ppo_math.importance_weights(
                part.old, part.sampled, part.mask, self.settings.most_weight
            )
            loss = (weights * losses).sum() / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total_loss += loss.item()
            num_clipped += clipped.sum().item()
            # Of replies that the old policy drew: KL(old || new) by k3.
            moved += (ppo_math.kl_k3(part.old, logprobs.detach()) * part.mask).sum().item()
        parameters = self.optimizer.param_groups[0]["params"]
        total_loss, num_clipped, moved, num_replies = self.team.sum_numbers(
            total_loss, num_clipped, moved, sum(len(part.ended) for part in minibatch)
        )
        if not math.isfinite(total_loss):
            raise NonFinite(f"PPO's loss became {total_loss}.")
        self.team.sum_gradients(parameters)
        length = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if not math.isfinite(length):
            raise NonFinite(f"The length of PPO's gradient became {length}.")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Pass(num_clipped / float(num_tokens), moved / num_replies)

    def _measure(self, number: int, microbatches: Sequence[Microbatch]) -> dict[str, Any]:
        def joined(parts: Sequence[Tensor]) -> Tensor:
            return self.team.join_rows(torch.cat(list(parts)))

        real = [part.mask.bool() for part in microbatches]
        num_tokens, num_replies, surprise = self.team.sum_numbers(
            sum(int(mask.sum()) for mask in real),
            sum(len(part.ended) for part in microbatches),
            -sum(part.old.sum().item() for part in microbatches),
        )
        judged = joined([part.judged for part in microbatches])
        returns = joined([part.returns[mask] for part, mask in zip(microbatches, real, strict=True)])
        values = joined([part.values[mask] for part, mask in zip(microbatches, real, strict=True)])
        return {
            "score": joined([pessimistic(part, self.settings) for part in microbatches]).mean().item(),
            "judge": judged.mean().item(),
            "judge_error": judged.mean(1).std().item() / math.sqrt(num_replies),
            "judges": tuple(judged.mean(0).tolist()),
            "disagreement": joined([disagreement(part) for part in microbatches]).mean().item(),
            "kl": self._mean_kl(ppo_math.kl_k3, microbatches),
            "entropy": surprise / num_tokens,
            "gap": self._gap([part for part in microbatches if not part.trusted]),
            "length": num_tokens / num_replies,
            "ended": joined([part.ended for part in microbatches]).mean().item(),
            "repeated": joined([part.repeated for part in microbatches]).mean().item(),
            "value_explained": (1 - (returns - values).var() / returns.var().clamp(min=1e-8)).item(),
        }

    def _gap(self, microbatches: Sequence[Microbatch]) -> float:
        """Between sampler and trainer, nats per token."""
        gap, num_tokens = self.team.sum_numbers(
            sum(ppo_math.gaps(part.old, part.sampled, part.mask).sum().item() for part in microbatches),
            sum(int(part.mask.sum()) for part in microbatches),
        )
        return gap / num_tokens

    def _mean_kl(
        self, estimate: Callable[[Tensor, Tensor], Tensor], microbatches: Sequence[Microbatch]
    ) -> float:
        """To the anchor, nats per reply: by k3 to report, and by k1 to steer, since one unlikely token can make k3 leap."""
        total, num_replies = self.team.sum_numbers(
            sum((estimate(part.old, part.reference) * part.mask).sum().item() for part in microbatches),
            sum(len(part.ended) for part in microbatches),
        )
        return total / num_replies


def _check_shares(num_rollouts: int, microbatch: int, num_processes: int) -> None:
    if num_rollouts % num_processes or microbatch % num_processes:
        common = math.gcd(num_rollouts, microbatch)
        fitting = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
        raise ValueError(
            f"{num_rollouts} rollouts in microbatches of {microbatch} cannot be shared evenly by {num_processes} processes: "
            f"start {fitting}."
        )


def pessimistic(part: Microbatch, settings: PPOSettings) -> Tensor:
    """[B] ensemble mean less its disagreement, within bounds, less a penalty for a missing end and one for repetition."""
    score = part.scores.mean(1) - settings.disagreement * disagreement(part)
    faults = 1 - part.ended + part.repeated
    return score.clamp(-settings.most_score, settings.most_score) - settings.fault_penalty * faults
