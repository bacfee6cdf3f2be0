"""Each check of the gate by itself, and the guard set's file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.errors import SettingsError
from trainer.gate import Sample, decide
from trainer.guard import Guard, load_guards

LIVE = Sample(
    judged=torch.linspace(-1, 1, 100),
    right=0.7,
    ended=1.0,
    repeated=0.0,
    length=10.0,
    shown=[],
    preference=torch.zeros(50),
)
BETTER = replace(LIVE, judged=LIVE.judged + 0.5 + 0.1 * torch.linspace(1, -1, 100), preference=torch.ones(50))


def failed(candidate: Sample, kl: float = 3.0, finite: bool = True) -> list[str]:
    return [check.name for check in decide(candidate, LIVE, kl, 5.0, finite).checks if not check.passed]


def test_a_better_policy_passes() -> None:
    assert failed(BETTER) == []


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"judged": LIVE.judged - 0.1}, "judge"),
        ({"judged": LIVE.judged * float("nan")}, "judge"),
        ({"preference": -torch.ones(50)}, "votes"),
        ({"right": 0.69}, "guard"),
        ({"ended": 0.95}, "ended"),
        ({"repeated": 0.05}, "repeated"),
        ({"length": 25.0}, "length"),
    ],
)
def test_each_check_refuses_by_itself(change: dict[str, object], check: str) -> None:
    assert failed(replace(BETTER, **change)) == [check]  # type: ignore[arg-type]


def test_kl_past_its_budget_and_broken_weights_are_refused() -> None:
    assert failed(BETTER, kl=8.0) == ["kl"]
    assert failed(BETTER, finite=False) == ["finite"]


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
