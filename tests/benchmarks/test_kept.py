"""A benchmark of hours goes on where it was cut off."""

from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.kept import Kept


@dataclass(frozen=True)
class Score:
    value: float


def never() -> Score:
    raise AssertionError("it was there")


def test_what_was_kept_is_not_done_again_and_what_was_cut_off_is(tmp_path: Path) -> None:
    path = tmp_path / "results" / "scores.jsonl"
    first = Kept(path, resume=False)
    assert first.get(("warm", 0), Score, lambda: Score(0.5)) == Score(0.5)
    assert first.get(("warm", 1), list[Score], lambda: [Score(0.25)]) == [Score(0.25)]
    path.write_text(path.read_text() + '{"key": ["warm", 2], "resu')
    second = Kept(path, resume=True)
    assert second.get(("warm", 0), Score, never) == Score(0.5)
    assert second.get(("warm", 1), list[Score], lambda: [never()]) == [Score(0.25)]
    assert second.get(("warm", 2), Score, lambda: Score(0.75)) == Score(0.75)
    assert Kept(path, resume=True).get(("warm", 2), Score, never) == Score(0.75)


def test_without_resuming_all_is_done_anew(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    Kept(path, resume=False).get(("warm", 0), Score, lambda: Score(0.5))
    assert Kept(path, resume=False).get(("warm", 0), Score, lambda: Score(1.0)) == Score(1.0)
