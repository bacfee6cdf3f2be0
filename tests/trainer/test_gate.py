"""Each check of the gate by itself, and the guard set's file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.errors import SettingsError
from trainer.gate import Sample, decide, decide_anchor, mean_chosen_length
from trainer.guard import Guard, load_guards
from trainer.preferences import Pair, Source

LIVE = Sample(
    judged=torch.linspace(-1, 1, 100),
    right=torch.tensor([1.0] * 70 + [0.0] * 30),
    kl=2.0,
    ended=1.0,
    repeated=0.0,
    length=10.0,
    shown=[],
    preference=torch.zeros(50),
)
CHOSEN_LENGTH = 12.0
ANCHOR_RIGHT = torch.tensor([1.0] * 60 + [0.0] * 40)
BETTER = replace(LIVE, judged=LIVE.judged + 0.5 + 0.1 * torch.linspace(1, -1, 100), preference=torch.ones(50))


def failed(candidate: Sample, anchor_right: torch.Tensor = ANCHOR_RIGHT, finite: bool = True) -> list[str]:
    checks = decide(candidate, LIVE, anchor_right, CHOSEN_LENGTH, 5.0, finite).checks
    return [check.name for check in checks if not check.passed]


def test_replies_may_become_twice_as_long_as_lives_or_as_those_that_users_chose() -> None:
    longer = replace(BETTER, length=23.0)
    assert failed(longer) == []
    assert not decide(longer, LIVE, ANCHOR_RIGHT, 9.0, 5.0, finite=True).passed


def test_the_length_that_users_chose_is_that_of_preferred_replies_alone() -> None:
    source = Source("1", "prompt", "user")
    short, long, longest = [1] * 4, [1] * 8, [1] * 60
    pairs = [
        Pair([1], short, longest, 1.0, source),
        Pair([1], short, long, 0.0, source),
        Pair([1], longest, longest, 0.5, source),
    ]
    assert mean_chosen_length(pairs) == 6.0
    assert mean_chosen_length(pairs[2:]) == 0.0


def guard_shares(right: int) -> torch.Tensor:
    """So many of 100 guard prompts answered right."""
    return torch.tensor([1.0] * right + [0.0] * (100 - right))


def test_a_better_policy_passes() -> None:
    assert failed(BETTER) == []


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"judged": LIVE.judged - 0.1}, "judge"),
        ({"judged": LIVE.judged * float("nan")}, "judge"),
        ({"preference": -torch.ones(50)}, "votes"),
        ({"right": guard_shares(63)}, "guard"),
        ({"kl": 8.0}, "kl"),
        ({"ended": 0.95}, "ended"),
        ({"repeated": 0.05}, "repeated"),
        ({"length": 25.0}, "length"),
    ],
)
def test_each_check_refuses_by_itself(change: dict[str, object], check: str) -> None:
    assert failed(replace(BETTER, **change)) == [check]  # type: ignore[arg-type]


SHOWN = replace(LIVE, preference=torch.ones(50))
"""As good as live, and agreeing more with the votes."""
LIKELIER = 0.5 + 0.1 * torch.linspace(-1, 1, 20)


def failed_as_anchor(candidate: Sample, likelier: torch.Tensor = LIKELIER, finite: bool = True) -> list[str]:
    checks = decide_anchor(candidate, LIVE, ANCHOR_RIGHT, likelier, 20.0, finite).checks
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, []),
        ({"kl": 80.0}, []),  # it may leave the old anchor as far as it will
        ({"judged": LIVE.judged - 0.005 + 0.1 * torch.linspace(1, -1, 100)}, []),
        ({"judged": LIVE.judged - 0.1 + 0.1 * torch.linspace(1, -1, 100)}, ["judge"]),
        ({"preference": -torch.ones(50)}, ["votes"]),
        ({"right": guard_shares(63)}, ["guard"]),
        ({"right": guard_shares(59)}, ["guard", "guard_anchor"]),
        ({"ended": 0.95}, ["ended"]),
        ({"repeated": 0.05}, ["repeated"]),
        ({"length": 39.0}, []),  # twice as long as what was shown
        ({"length": 41.0}, ["length"]),
    ],
)
def test_a_new_anchor_passes_the_checks_that_make_sense_for_it(
    change: dict[str, object], failing: list[str]
) -> None:
    assert failed_as_anchor(replace(SHOWN, **change)) == failing  # type: ignore[arg-type]


def test_a_new_anchor_must_find_held_out_demonstrations_likelier() -> None:
    assert failed_as_anchor(SHOWN, LIKELIER - 0.5) == ["demonstrations"]
    assert failed_as_anchor(SHOWN, finite=False) == ["finite"]


def test_a_new_anchor_needs_no_votes() -> None:
    unjudged = replace(LIVE, judged=torch.zeros(0), preference=torch.zeros(0))
    assert decide_anchor(unjudged, unjudged, ANCHOR_RIGHT, LIKELIER, 20.0, True).passed


def test_broken_weights_are_refused() -> None:
    assert failed(BETTER, finite=False) == ["finite"]


def test_chance_may_cost_a_right_answer_but_not_below_the_anchor() -> None:
    slightly_worse = replace(BETTER, right=guard_shares(69))
    assert failed(slightly_worse) == []
    assert failed(slightly_worse, anchor_right=LIVE.right) == ["guard_anchor"]


def test_without_a_guard_set_nothing_of_it_can_fall() -> None:
    none = torch.zeros(0)
    live, candidate = replace(LIVE, right=none), replace(BETTER, right=none)
    assert decide(candidate, live, none, 0.0, 5.0, finite=True).passed


def test_chance_in_few_held_out_votes_refuses_nothing() -> None:
    agrees_in_24_of_50 = torch.tensor([1.0] * 24 + [-1.0] * 26)
    assert failed(replace(BETTER, preference=agrees_in_24_of_50)) == []


def test_a_guard_needs_its_right_and_forbids_its_wrong() -> None:
    guard = Guard([{"role": "user", "content": "What colour is a lemon?"}], r"\byellow\b", r"\b(red|blue)\b")
    assert guard.passes("Yellow, of course.")
    assert not guard.passes("Yellow or blue.")
    assert not guard.passes("I do not know.")


def test_a_guard_set_is_read_or_refused(tmp_path: Path) -> None:
    assert load_guards(None, tmp_path) == []
    with pytest.raises(SettingsError, match="RATCHET_GUARD: there is no file"):
        load_guards(tmp_path / "none.jsonl", tmp_path)
    (tmp_path / "guard.jsonl").write_text('{"messages": [], "right": "a"}\n')
    with pytest.raises(SettingsError, match=r"RATCHET_GUARD: guard\.jsonl is not"):
        load_guards(None, tmp_path)
