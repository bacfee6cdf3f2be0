"""Cycles in a row: each learns from all votes so far, the new ones on replies of the policy that is live by then."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

from service.settings import Settings
from tests.benchmarks.learning_methods import RANK, Lesson, learn_ours
from tests.benchmarks.learning_users import draw_votes, judge
from trainer.models import Roles

NEW_VOTES = int(Settings.model_fields["cycle_votes"].default)
"""That a service waits for."""
APART = 10_000
"""Between the seeds of two cycles' votes."""


@dataclass(frozen=True, slots=True)
class Step:
    """The live policy after a cycle; of cycle 0 the starter."""

    taste: str
    seed: int
    cycle: int
    votes: int
    """So far."""
    score: float
    """Mean of the taste's over the replies to the fixed questions."""
    win_rate: float
    """Against the starter."""
    correct: float
    spoilt: float
    remark: str


def go_on(lesson: Lesson, taste: str, num_cycles: int) -> Iterator[Step]:
    """The starter, and then what each cycle leaves live."""
    roles = Roles.load(lesson.starter, RANK)
    before = judge(roles, lesson.taste, lesson.seed, draw=0)
    after, remark, votes = before, "", list(lesson.votes)
    for cycle in range(num_cycles + 1):
        if cycle > 0:
            live = roles.policy_state()
            if cycle > 1:
                votes += draw_votes(roles, lesson.taste, NEW_VOTES, lesson.seed + cycle * APART, lesson.flip)
            learnt, remark = learn_ours(replace(lesson, votes=votes), roles, f"cycle-{cycle}", cycle)
            if learnt:
                after = judge(roles, lesson.taste, lesson.seed, draw=cycle)
            else:
                roles.load_policy_state(live)
        yield Step(
            taste=taste,
            seed=lesson.seed,
            cycle=cycle,
            votes=len(votes) if cycle else 0,
            score=statistics.fmean(after.taste),
            win_rate=after.beats(before),
            correct=after.correct,
            spoilt=after.spoilt,
            remark=remark,
        )
