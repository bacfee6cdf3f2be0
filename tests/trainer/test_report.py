"""A cycle's report: whole, whatever stage it ended in, and nothing in it is taken for markup."""

from pathlib import Path
from typing import Any

import pytest

from trainer import report

ACCURACY = {"share": 0.8, "low": 0.7, "high": 0.9, "num_pairs": 60}
ITERATION = {
    "number": 0,
    "kl": 0.0,
    "score": 0.0,
    "judge": 0.0,
    "judge_error": 0.1,
    "disagreement": 0.2,
    "length": 9.0,
    "gap": 0.002,
    "guard": {"num_right": 50, "num_asked": 64, "live": 0.75},
}
METRICS: dict[str, Any] = {
    "snapshot": {"sha256": "ab" * 32, "votes": 300, "rankings": 2, "demonstrations": 1, "prompts": 900},
    "reward_model": {
        "accuracy": ACCURACY,
        "log_loss": 0.45,
        "calibration_error": 0.03,
        "reliability": [{"confidence": 0.6, "accuracy": 0.62, "num_pairs": 30}],
        "by_policy": {"policy-000000": ACCURACY},
        "by_cohort": {"vote": ACCURACY},
        "length_correlation": -0.2,
        "held_out_by": "user and prompt",
        "held_out_pairs": 60,
        "train_pairs": 240,
    },
    "training": {
        "method": "ppo",
        "iterations": [ITERATION, ITERATION | {"number": 1, "kl": 0.5, "score": 0.4, "judge": 0.3}],
        "kept": 1,
        "why": "all iterations were done",
    },
    "gate": {"checks": [{"meaning": "KL", "value": 9.0, "threshold": 7.5, "passed": False}]},
    "duel": {
        "wins": 31,
        "losses": 12,
        "ties": 3,
        "interval": {"low": 0.52, "high": 0.86},
        "evidence_better": 24.0,
        "evidence_worse": 0.1,
    },
    "samples": [{"prompt": "<b>so?</b>", "before": "no", "after": "<script>alert(1)</script>"}],
}
TUNED = {
    "method": "sft",
    "epochs": [{"number": 0, "held_out_loss": 3.0}, {"number": 1, "held_out_loss": 1.0}],
    "kept": 1,
    "why": "all epochs were done",
}
SECTIONS = {
    "snapshot": "1 demonstrations; 900 prompts that nobody judged",
    "reward_model": "Reward model",
    "training": "Training (ppo)",
    "gate": "Gate",
    "duel": "Duel",
    "samples": "Samples",
}


def test_it_says_how_demonstrations_were_learnt(tmp_path: Path) -> None:
    path = tmp_path / report.REPORT
    report.write(path, 7, "promoted", "It is live.", {"training": TUNED})
    assert "Training (sft)" in path.read_text()
    assert "Kept epoch 1 of 1: all epochs were done." in path.read_text()


def test_it_says_all_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / report.REPORT
    report.write(path, 7, "rejected", "The gate refused it: kl.", METRICS)
    text = path.read_text()
    for said in (
        "Cycle 7: rejected",
        "The gate refused it: kl.",
        "300 votes, 2 rankings, 1 demonstrations",
        "0.80 [0.70, 0.90]",
    ):
        assert said in text
    for said in (
        "Held out by user and prompt",
        "calibration error 0.030",
        "Kept iteration 1 of 2",
        "differed by at most 0.0020 nats a token",
        "0.52 to 0.86",
        'class="failed">FAILED',
    ):
        assert said in text
    assert text.count("<svg") == 5
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>so" not in text
    assert not list(tmp_path.glob("*.partial"))
    iterations = [iteration | {"guard": None} for iteration in METRICS["training"]["iterations"]]
    without = METRICS | {"training": METRICS["training"] | {"iterations": iterations}}
    report.write(tmp_path / "unguarded.html", 7, "rejected", "The gate refused it: kl.", without)
    assert (tmp_path / "unguarded.html").read_text().count("<svg") == 4
    report.write(tmp_path / "again.html", 7, "rejected", "The gate refused it: kl.", METRICS)
    assert len((tmp_path / "again.html").read_text()) == pytest.approx(len(text), abs=200)


@pytest.mark.parametrize("known", range(len(SECTIONS)))
def test_a_cycle_that_ended_early_has_the_sections_that_it_reached(known: int, tmp_path: Path) -> None:
    reached = list(SECTIONS)[:known]
    report.write(tmp_path / report.REPORT, 1, "failed", "no votes", {name: METRICS[name] for name in reached})
    text = (tmp_path / report.REPORT).read_text()
    assert [name for name, title in SECTIONS.items() if title in text] == reached
