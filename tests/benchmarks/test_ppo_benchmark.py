"""The PPO benchmark's own arithmetic, and our side of it on a tiny model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.benchmarks import ppo
from tests.benchmarks.gateway_samples import Spread
from tests.benchmarks.ppo_model import Floor, Size, count_floor, make_base
from tests.benchmarks.ppo_ours import work
from tests.benchmarks.ppo_report import Contest, above_idle, contest_goals, contest_report
from tests.benchmarks.ppo_visit import Figures, Job, Memory
from trainer.starter import Recipe

TINY = Recipe(hidden=64, layers=1, feed_forward=64, vocabulary=400)


def test_the_floor_by_hand() -> None:
    # hidden 2, 1 layer, feed-forward 3, vocabulary 5: 4 * 4 + 3 * 6 = 34 weights. A prompt of 2 and a reply of 3 tokens: 4 are read,
    # 2 * 34 * 4 = 272; attention 4 * 2 * (1 + 2 + 3 + 4) = 80; logits 2 * 5 * 2 * 3 = 60. An update: 2 * 272 + 3 * 80 + 2 * 60 = 904.
    floor = count_floor(Recipe(hidden=2, layers=1, feed_forward=3, vocabulary=5), 2, 3, epochs=2)
    assert floor == Floor(sampling=412, reading=412, updates=2 * 904)
    assert floor.total == 2 * 412 + 2 * 904


def test_the_floor_has_updates_of_adapted_layers_alone() -> None:
    recipe = Recipe(hidden=2, layers=3, feed_forward=3, vocabulary=5)  # a half of three layers is two
    floor = count_floor(recipe, 2, 3, epochs=1, share=0.5)
    assert floor == Floor(
        sampling=3 * 352 + 60, reading=3 * 352 + 60, updates=2 * (2 * 272 + 3 * 80) + 2 * 60
    )


def job(base: Path) -> Job:
    return Job(str(base), 8, 4, epochs=1, reply_tokens=5, iterations=1, dtype="float32", rank=2, layers=0.5)


def test_our_side_trains_on_full_replies(tmp_path: Path) -> None:
    make_base(tmp_path, TINY, num_prompts=8)
    figures = work(job(tmp_path))
    assert len(figures.seconds) == len(figures.cpu_seconds) == 1
    assert figures.seconds[0] > 0
    assert figures.idle_mib > 0
    # Linux counts pages by processor and adds them up now and then: of a tiny model, the peak may seem to be some KiB less.
    assert figures.peak_mib > figures.idle_mib - 1
    # rank 2 on 7 matrices of 64 x 64, and on the output embeddings of 400 words
    assert figures.trained == 2 * (7 * (64 + 64) + 64 + 400)


def test_memory_that_came_and_went_is_in_the_peak() -> None:
    memory = Memory()
    assert memory.peak_mib < memory.idle_mib + 32
    block = torch.ones(16 * 2**20)  # 64 MiB
    del block
    assert memory.peak_mib > memory.idle_mib + 60


def test_the_model_cannot_end_a_reply(tmp_path: Path) -> None:
    model = make_base(tmp_path, TINY, num_prompts=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        odds = model(input_ids=torch.tensor([job(tmp_path).prompts[0]])).logits.softmax(-1)
    assert odds[..., [tokenizer.pad_token_id, tokenizer.eos_token_id]].max() < 1e-9


def test_rounds_turn_the_order_around_and_all_ends_in_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    visited: list[str] = []
    written: list[str] = []

    def visit(python: Path, module: str, job: Job) -> Figures:
        visited.append(module.rpartition("_")[2])
        return Figures([1.0], [1.0], 100.0, 200.0, 7, job.dtype)

    monkeypatch.setattr(ppo, "run", visit)
    monkeypatch.setattr(ppo, "SIZES", (Size("1 k", TINY, samples=4, minibatch=2),))
    monkeypatch.setattr(ppo, "measure_matrix_rate", lambda: {"float32": 1e9})
    monkeypatch.setattr(ppo, "write_results", lambda name, figures: written.append(name))
    monkeypatch.setattr("sys.argv", ["ppo", "--rounds", "2"])
    ppo.main()

    assert visited == ["ours", "trl", "trl", "ours"]
    assert written == ["ppo"]
    report = capsys.readouterr().out
    assert "| Ratchet / TRL | 1.00 [1.00, 1.00] |" in report
    assert "| samples/s over TRL's, 1 k | >= 3 | 1.00 [1.00, 1.00] | **no** |" in report


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text("[[1, 2], [3, 4]]")

    def visit(seconds: float, peak: float) -> Figures:
        return Figures([seconds], [2 * seconds], 100.0, peak, 7, "float32")

    contest = Contest("tiny", 1000, job(tmp_path), 3, Floor(1e9, 2e9, 3e9))
    contest.ours = [visit(1, 150), visit(2, 120)]
    contest.theirs = [visit(4, 300), visit(6, 200)]
    contest.matrix_rates = [{"float32": 60e9, "bfloat16": 30e9}] * 2

    assert contest.ratio(contest.speed) == Spread(median=3.5, least=3, most=4)
    assert contest.ratio(above_idle) == Spread(median=pytest.approx(0.225), least=0.2, most=0.25)
    assert contest.bounds() == [10, 10]
    assert [goal.met for goal in contest_goals(contest)] == [True, False, True]
    assert "| floor | 10.0 [10.0, 10.0] |" in contest_report(contest)
    assert "adapter of rank 2 on the last 2 of 3 layers" in contest_report(contest)
