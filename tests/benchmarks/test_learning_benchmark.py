"""What the learning benchmark shows is what its runs were, and TRL is given the votes that there are."""

from tests.benchmarks.learning_methods import as_trl
from tests.benchmarks.learning_report import Run, method_summary
from tests.benchmarks.learning_users import Judged, SimulatedVote

QUESTION = [{"role": "user", "content": "What colour is a lemon?"}]


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
