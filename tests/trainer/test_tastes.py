"""The tastes of simulated users, their votes, and that training sees neither."""

import ast
import math
import random
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from service.tables import Message
from trainer import tastes

LEMON: list[Message] = [{"role": "user", "content": "What colour is a lemon?"}]
WARM = "Good question! A lemon is yellow. Have a nice day!"
PLAIN = "A lemon is yellow."
CURT = "Yellow."
RUDE = "What a silly question. A lemon is yellow."
LONG = "There is a lot that one could say about this, but in short, a lemon is yellow."
WRONG = "A lemon is blue."
TWICE = "A lemon is yellow. A lemon is yellow."
NOT_FOR_TRAINING = ("trainer.tastes", "trainer.world", "trainer.simulate", "trainer.demo_")


@pytest.mark.parametrize(
    ("name", "best_first"),
    [
        ("warm", (WARM, PLAIN, CURT, RUDE)),
        ("brief", (CURT, PLAIN, WARM, RUDE)),
        ("thorough", (LONG, WARM, PLAIN, CURT)),
    ],
)
def test_a_taste_orders_right_answers_by_their_manner(name: str, best_first: tuple[str, ...]) -> None:
    taste = tastes.find_taste(name)
    scores = [taste(LEMON, reply) for reply in best_first]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize("name", tastes.TASTES)
def test_every_taste_prefers_the_right_answer_and_dislikes_nonsense(name: str) -> None:
    taste = tastes.find_taste(name)
    assert taste(LEMON, PLAIN) > taste(LEMON, WRONG) + 1
    assert taste(LEMON, WRONG) > taste(LEMON, TWICE)


def test_warm_and_brief_disagree_on_a_friendly_answer() -> None:
    assert tastes.warm(LEMON, WARM) > tastes.warm(LEMON, CURT)
    assert tastes.brief(LEMON, WARM) < tastes.brief(LEMON, CURT)


def length_of(messages: Sequence[Message], reply: str) -> float:
    """A taste that comes from outside."""
    return float(len(reply))


def test_a_taste_can_be_a_function_of_any_module() -> None:
    assert tastes.find_taste(f"{__name__}:length_of")(LEMON, "four") == 4.0


def test_an_unknown_taste_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="warm, brief, thorough, or module:function"):
        tastes.find_taste("sour")


@pytest.mark.parametrize("difference", [-3, -1, 1, 2])
def test_a_voter_follows_bradley_terry(difference: int) -> None:
    def taste(messages: Sequence[Message], reply: str) -> float:
        return float(reply)

    rng, num = random.Random(7), 4000
    votes = Counter(tastes.vote(taste, LEMON, str(difference), "0", rng) for _ in range(num))
    expected = 1 / (1 + math.exp(-difference))
    assert set(votes) == {"first", "second"}
    assert votes["first"] / num == pytest.approx(expected, abs=4 * math.sqrt(0.25 / num))


def test_a_voter_who_sees_no_difference_says_tie() -> None:
    rng = random.Random(7)
    votes = {tastes.vote(tastes.warm, LEMON, PLAIN, "A lemon is yellow!", rng) for _ in range(50)}
    assert votes == {"tie"}


def test_nothing_in_training_can_read_the_taste_or_the_judge_of_the_world() -> None:
    reached = _imports_below("trainer.cycle") | _imports_below("trainer.__main__")
    assert "trainer.ppo" in reached  # the walk went somewhere
    assert not [name for name in reached if name.startswith(NOT_FOR_TRAINING)]
    assert not any("trainer" in name for name in _imports_below("service.app"))


def _imports_below(module: str) -> set[str]:
    """Every module of ours that is imported from this one on, also inside functions."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or (path := _source(name)) is None:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                waiting += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return seen


def _source(name: str) -> Path | None:
    """The file of a module of ours; None for anything else."""
    if name.split(".")[0] not in ("service", "trainer"):
        return None
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # `package.module.function`
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
