"""Which policy of a run is kept, and when the run ends."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.iterations import (
    Guarded,
    Iteration,
    averaged,
    checkpoint_path,
    choose_kept,
    forgets,
    load_average,
    mix,
    objection,
    prune,
)

EMPTY = Iteration(0, 0, 0, 0.1, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_an_iteration_that_an_earlier_release_stored_is_still_read() -> None:
    now = replace(EMPTY, judge=0.5, passes=6, gap=0.003, guard=Guarded(48, 64, 0.75), judges=(0.4, 0.6))
    assert Iteration.from_dict(json.loads(json.dumps(asdict(now)))) == now
    before = asdict(now)
    del before["passes"], before["gap"], before["judges"]
    assert Iteration.from_dict(before) == replace(now, passes=0, gap=0.0, judges=())


def judged(*scores: float) -> list[Iteration]:
    return [replace(EMPTY, number=number, judge=score) for number, score in enumerate(scores)]


def guarded(*num_right: int, live: float = 0.75) -> list[Iteration]:
    """Of 64 each, while the judge likes every policy better than the one before."""
    return [
        replace(EMPTY, number=number, judge=float(number), guard=Guarded(right, 64, live))
        for number, right in enumerate(num_right)
    ]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ((0.0,), 0),
        ((0.0, 0.5, 0.9), 2),
        ((0.0, 0.9, 0.5), 2),  # .4, less than three errors of a difference, which are .42
        ((0.0, 0.9, 0.45, 0.4), 1),
    ],
)
def test_the_last_policy_that_the_judge_does_not_call_worse_is_kept(
    scores: tuple[float, ...], kept: int
) -> None:
    assert choose_kept(judged(*scores)) == kept


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ((0.9, 0.9, 0.9), (0.4, 0.4, 0.4), 0),  # all heads say so, and by the replies three errors are .42
        ((0.9, 1.3, 0.5), (0.4, 0.8, 0.0), 0),  # they differ, but not in which of the two is better
        ((0.6, 0.9, 1.2), (0.8, 0.4, 0.0), 1),  # by other votes it would have been the other way round
        ((), (0.8, 0.4, 0.0), 0),  # an earlier release's has no heads
    ],
)
def test_a_policy_is_not_worse_that_other_votes_would_have_called_better(
    first: tuple[float, ...], second: tuple[float, ...], kept: int
) -> None:
    run = [
        replace(EMPTY, number=0, judge=0.9, judges=first),
        replace(EMPTY, number=1, judge=0.4, judges=second),
    ]
    assert choose_kept(run) == kept


def test_a_run_ends_when_the_judge_has_called_five_in_a_row_worse() -> None:
    assert objection(judged(0.0, 0.9, 0.4, 0.3, 0.3, 0.2)) is None
    assert objection(judged(0.0, 0.9, 0.4, 0.3, 0.3, 0.2, 0.2)) == (
        "the held-out judge called 5 iterations in a row worse than the best"
    )


def test_five_iterations_together_tell_whether_the_guard_set_is_forgotten() -> None:
    # 48 of 64 is live's share; 2 standard errors of 320 replies are 4.8 points.
    assert not forgets(guarded(48, 46, 45, 45, 46))
    assert forgets(guarded(48, 45, 44, 44, 43))
    assert not forgets(guarded(30, 30, 30, 30))  # too few to tell
    assert not forgets(judged(0.0, 0.1, 0.2, 0.3, 0.4, 0.5))  # no guard set


def test_what_forgets_is_not_kept_however_much_the_judge_likes_it_and_goes_on_since_it_may_learn_again() -> (
    None
):
    run = guarded(48, 48, 48, 48, 48, 48, 30, 30, 30, 30, 30, 30, 30)
    assert choose_kept(run) == 5
    assert objection(run) is None
    learnt_again = guarded(48, 48, 48, 48, 48, 48, 30, 30, 30, 30, 48, 48, 48, 48, 48)
    assert choose_kept(learnt_again) == 14


def test_iterations_are_the_same_after_they_were_stored() -> None:
    for iteration in (guarded(48)[0], judged(0.5)[0]):
        assert Iteration.from_dict(asdict(iteration)) == iteration


def test_the_average_is_of_the_last_half_and_of_ten_at_most(tmp_path: Path) -> None:
    for number in range(31):
        torch.save({"weight": torch.tensor([float(number)])}, checkpoint_path(tmp_path, number))
    means = {number: load_average(tmp_path, number)["weight"].item() for number in (1, 4, 30)}
    assert means == {1: 1.0, 4: 3.5, 30: 25.5}


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 0.3), st.integers(30, 64)), min_size=1, max_size=40)
)
def test_whatever_comes_no_weights_are_averaged_that_were_not_needed_before(
    measured: list[tuple[float, float, int]],
) -> None:
    run = [
        replace(EMPTY, number=number, judge=judge, judge_error=error, guard=Guarded(right, 64, 0.75))
        for number, (judge, error, right) in enumerate(measured)
    ]
    first = [averaged(choose_kept(run[: length + 1])).start for length in range(len(run))]
    assert first == sorted(first)


def test_weights_that_are_needed_no_more_go_but_for_the_first(tmp_path: Path) -> None:
    for number in range(25):
        torch.save({"weight": torch.tensor([float(number)])}, checkpoint_path(tmp_path, number))
    before = load_average(tmp_path, 20)
    for kept, left in ((0, range(1, 25)), (4, range(3, 25)), (20, range(11, 25))):
        prune(tmp_path, kept)
        assert sorted(int(path.stem) for path in tmp_path.iterdir()) == [0, *left]
    assert torch.equal(load_average(tmp_path, 20)["weight"], before["weight"])


def test_a_mixture_lies_on_the_way_from_live_to_what_was_trained() -> None:
    began, trained = {"weight": torch.tensor([1.0, -2.0])}, {"weight": torch.tensor([3.0, 2.0])}
    assert mix(began, trained, 0.25)["weight"].tolist() == [1.5, -1.0]
    assert torch.equal(mix(began, trained, 1.0)["weight"], trained["weight"])
