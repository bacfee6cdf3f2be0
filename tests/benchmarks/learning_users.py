"""Simulated users without a service: votes on replies sampled here, and how a policy's replies are scored.

The same questions, tastes and Bradley-Terry voters as `make demo`. Used by `learning.py`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.pairing import objection
from service.policies import BASE
from service.tables import Message
from trainer import tastes, world
from trainer.demo_client import Reply
from trainer.demo_scores import is_spoilt, win_rate
from trainer.gate import measure_kl
from trainer.models import POLICY, REFERENCE, Roles
from trainer.rollouts import Rollout, Sampler
from trainer.simulated_users import draw_evaluation
from trainer.snapshot import RANKS, Feedback
from trainer.tastes import Taste

NUM_USERS = 8
NUM_QUESTIONS = 1000
MOST_TOKENS = 64
MIN_P = 0.02
"""As the service samples by default."""


@dataclass(frozen=True, slots=True)
class SimulatedVote:
    """Two replies to a question, and which one the user took."""

    user: str
    messages: Sequence[Message]
    first: str
    second: str
    choice: str

    def flipped(self) -> "SimulatedVote":
        """By somebody who wants the contrary, or did not look."""
        contrary = {"first": "second", "second": "first"}
        return SimulatedVote(
            self.user, self.messages, self.first, self.second, contrary.get(self.choice, self.choice)
        )

    def as_feedback(self, number: int) -> Feedback:
        """As a snapshot holds it."""
        replies = [self.first, self.second]
        messages = list(self.messages)
        policies: list[str | None] = [BASE, BASE]
        return Feedback(
            "vote", str(number), self.user, messages, replies, RANKS[self.choice], policies, False
        )


@dataclass(frozen=True, slots=True)
class Judged:
    """A policy's replies to the fixed questions, as the taste sees them."""

    taste: list[float]
    correct: float
    spoilt: float
    kl: float
    """To the anchor, nats per reply."""

    def beats(self, starter: "Judged") -> float:
        """Win rate against the starter's replies to the same questions; equal ones are half a win."""
        return win_rate([mine - other for mine, other in zip(self.taste, starter.taste, strict=True)]).value


def draw_votes(roles: Roles, taste: Taste, count: int, seed: int, flip: float = 0.0) -> list[SimulatedVote]:
    """So many votes on pairs of replies of the policy in `roles`; a share `flip` of them is turned round."""
    rng = random.Random(f"votes {seed}")
    generator = torch.Generator(device=roles.device).manual_seed(seed)
    votes: list[SimulatedVote] = []
    while len(votes) < count:
        questions = [world.draw_question(rng) for _ in range(128)]
        prompts = [roles.prompt_ids(question.messages) for question in questions for _ in range(2)]
        replies = [as_reply(roles, rollout) for rollout in _sample(roles, prompts, generator)]
        for question, first, second in zip(questions, replies[::2], replies[1::2], strict=True):
            if objection([(reply.text, reply.finish_reason) for reply in (first, second)]):
                continue
            choice = tastes.vote(taste, question.messages, first.text, second.text, rng)
            user = f"user-{rng.randrange(NUM_USERS)}"
            vote = SimulatedVote(user, question.messages, first.text, second.text, choice)
            votes.append(vote.flipped() if rng.random() < flip else vote)
    return votes[:count]


def judge(roles: Roles, taste: Taste, seed: int, draw: int, anchor: Roles | None = None) -> Judged:
    """Ask the policy in `roles` the questions of that seed, once each. draw: another one has other random numbers.

    anchor: that KL is measured to, where it is not that of `roles`.
    """
    questions = draw_evaluation(NUM_QUESTIONS, seed)
    prompts = [roles.prompt_ids(question.messages) for question in questions]
    generator = torch.Generator(device=roles.device).manual_seed(seed + draw * 1_000_003)
    rollouts = _sample(roles, prompts, generator)
    return judge_replies(
        taste,
        questions,
        [as_reply(roles, rollout) for rollout in rollouts],
        measure_kl(roles, rollouts, anchor),
    )


def judge_replies(
    taste: Taste, questions: Sequence[world.Question], replies: Sequence[Reply], kl: float
) -> Judged:
    """Score one reply to each question."""
    pairs = list(zip(questions, replies, strict=True))
    verdicts = [world.is_correct(question, reply.text) for question, reply in pairs]
    known = [verdict for verdict in verdicts if verdict is not None]
    return Judged(
        taste=[taste(question.messages, reply.text) for question, reply in pairs],
        correct=sum(known) / len(known),
        spoilt=sum(map(is_spoilt, replies)) / len(replies),
        kl=kl,
    )


def sample_anchor(roles: Roles, prompts: Sequence[list[int]], seed: int) -> list[Rollout]:
    """One reply of the anchor to each prompt, as served."""
    sampler = Sampler(roles.end_ids, MOST_TOKENS, min_p=MIN_P)
    with roles.acting_as(REFERENCE):
        return sampler.sample(roles.model, prompts, torch.Generator(device=roles.device).manual_seed(seed))


def _sample(roles: Roles, prompts: Sequence[list[int]], generator: torch.Generator) -> list[Rollout]:
    sampler = Sampler(roles.end_ids, MOST_TOKENS, min_p=MIN_P)
    with roles.acting_as(POLICY):
        return sampler.sample(roles.model, prompts, generator)


def as_reply(roles: Roles, rollout: Rollout) -> Reply:
    """As a client would see it."""
    return Reply(roles.decode(rollout.reply_ids), "stop" if rollout.ended else "length")
