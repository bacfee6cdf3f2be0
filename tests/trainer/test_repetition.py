"""`trainer/repetition.py`."""

import pytest

from trainer.repetition import repeats


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A lemon is yellow.", False),
        ("A lemon is yellow. a lemon is yellow.", True),
        ("It is and it was and it is and it was so.", True),
        ("Have a nice day! Have a nice day!", True),
        ("", False),
        ("one two three four", False),
        ("A bee says buzz, and a bee says hum.", False),
    ],
)
def test_a_sentence_or_four_words_said_twice_are_a_repetition(reply: str, expected: bool) -> None:
    assert repeats(reply) is expected
