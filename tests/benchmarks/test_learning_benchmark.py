"""What the learning benchmark shows is what its runs were, and TRL is given the votes that there are."""

import random
from pathlib import Path

from service.tables import Message
from tests.benchmarks.learning_methods import Lesson, _best_answer, as_trl, bound
from tests.benchmarks.learning_report import Run, method_summary
from tests.benchmarks.learning_users import Judged, SimulatedVote
from trainer import world
from trainer.tastes import TASTES

QUESTION: list[Message] = [{"role": "user", "content": "What colour is a lemon?"}]


def judged(*taste: float, correct: float) -> Judged:
    return Judged(taste=list(taste), correct=correct, spoilt=0.0, kl=1.5)


def test_trl_gets_the_votes_that_prefer_a_reply_and_no_ties() -> None:
    votes = [
        SimulatedVote("ada", QUESTION, "yellow", "blue", choice) for choice in ("first", "tie", "second")
    ]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in as_trl(votes)] == [
        ("yellow", "blue"),
        ("blue", "yellow"),
    ]
    assert all(row["prompt"] == QUESTION for row in as_trl(votes))


def test_a_method_is_summed_up_over_its_runs() -> None:
    starter = judged(0.0, 0.0, 0.0, 0.0, correct=0.6)
    better, equal = judged(1.0, 1.0, 1.0, -1.0, correct=0.8), judged(0.0, 0.0, 0.0, 0.0, correct=0.5)
    runs = [
        Run.of("warm", seed, "ours", starter, after, 10.0, "") for seed, after in enumerate((better, equal))
    ]
    assert [run.win_rate for run in runs] == [0.75, 0.5]
    [row] = method_summary(runs).splitlines()[2:]
    assert row == "| ours | 2 | 0.625 ± 0.250 [0.500] | 5.0 ± 30.0 [-10.0] | 1.50 | 0.0000 | 10 |"


def test_the_bound_is_always_right_and_never_spoilt() -> None:
    for taste in TASTES.values():
        best, _ = bound(Lesson(Path(), [], 0.0, taste, 0, Path()))
        assert best.correct == 1.0
        assert best.spoilt == 0.0


def test_the_bound_is_in_the_manner_that_the_taste_likes_best() -> None:
    question = world.find_question(QUESTION)
    assert question
    best = {name: _best_answer(question, taste, random.Random(1)) for name, taste in TASTES.items()}
    assert {name: world.find_manner(answer) for name, answer in best.items()} == {
        "warm": "warm",
        "brief": "curt",
        "thorough": "long",
    }
