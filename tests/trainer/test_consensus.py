"""What answers have in common, and how much of it a reply says, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.consensus import Asked, Consensus

LEMON, CHERRY, COW = (1, 2), (1, 3), (1, 4)
ANSWERS = ["A lemon is yellow.", "Yellow.", "A lemon is yellow!", "A lemon is green."]
CONSENSUS = Consensus.of(
    {
        LEMON: Asked("What colour is a lemon?", ANSWERS),
        CHERRY: Asked("And cherries?", ["Red.", "Red."]),
        COW: Asked("Where is one?", ["Far in the barn."]),
    }
)
YELLOW = 0.75
"""It is all that a lemon's answers are worth, and one of the four is not so sure."""


def read(*pieces: str, prompt: tuple[int, ...] = LEMON) -> list[float]:
    return CONSENSUS.read(prompt, pieces)


def near(*expected: float) -> object:
    return pytest.approx(list(expected), abs=1e-6)


def test_a_word_counts_by_the_answers_that_have_it_and_the_prompts_own_do_not() -> None:
    """`a`, `lemon` and `is` are in the prompt; green, in one answer of four, is some 10 ** 8 times less worth than yellow."""
    assert read("A", " lemon", " is", " yellow", ".", "") == near(0, 0, 0, 0, YELLOW, 0)
    assert read("A", " lemon", " is", " green", ".", "") == near(0, 0, 0, 0, 0, 0)


def test_words_that_a_prompt_makes_as_much_likelier_share_what_it_is_worth_to_say_all() -> None:
    assert read("in", " the", " barn", "", prompt=COW) == near(0, 0.25, 0.25, 0.25)


def test_what_other_prompts_are_answered_costs_what_it_is_worth_there() -> None:
    assert read("Red", "!", "") == near(0, -1.0, 0)
    assert read("A", " red", " barn", "", prompt=CHERRY) == near(0, 0, 1.0, -0.25)


def test_a_word_that_answers_to_all_prompts_have_as_often_says_nothing() -> None:
    consensus = Consensus.of({LEMON: Asked("", ["Sure, yellow."]), CHERRY: Asked("?", ["Sure, red."])})
    assert consensus.known == {LEMON: {"sure": 0.0, "yellow": 1.0}, CHERRY: {"sure": 0.0, "red": 1.0}}
    assert consensus.foreign == {"sure": 0.0, "yellow": 1.0, "red": 1.0}


def test_the_same_word_in_other_letters_and_other_tokens_is_the_same_word() -> None:
    assert read("Y", "ell", "ow", ".", "") == near(0, 0, 0, YELLOW, 0)


def test_a_word_belongs_to_the_token_by_which_it_has_ended() -> None:
    assert read(" yel", "low", ".", "") == near(0, 0, YELLOW, 0)
    assert read(" yel", "low.", "") == near(0, YELLOW, 0)
    assert read(" yel", "low") == near(0, YELLOW)  # cut off


def test_a_word_that_is_said_again_says_nothing_new() -> None:
    assert sum(read("yellow", " yellow", "!", "")) == pytest.approx(YELLOW)


def test_a_word_that_no_answer_has_says_nothing() -> None:
    assert read("Cheers", "!", "") == [0.0, 0.0, 0.0]


def test_words_that_end_with_one_token_are_added() -> None:
    assert read("yellow, red.", "") == near(YELLOW - 1.0, 0)


def test_an_empty_reply_says_nothing() -> None:
    assert read() == []
    assert read("") == [0.0]


def test_what_every_prompt_has_is_a_templates_and_no_prompts_own() -> None:
    consensus = Consensus.of(
        {LEMON: Asked("user: a lemon", ["a user"]), CHERRY: Asked("user: a cherry", ["a cherry"])}
    )
    assert consensus.known == {
        LEMON: {"a": 0.0, "user": 1.0, "lemon": 0.0},
        CHERRY: {"a": 0.0, "cherry": 0.0},
    }


def test_scripts_without_spaces_are_read_by_the_character() -> None:
    consensus = Consensus.of({LEMON: Asked("", ["\u9ec4\u8272"]), CHERRY: Asked("?", ["\u7ea2\u8272"])})
    assert consensus.known[LEMON] == {"\u8272": 0.0, "\u9ec4": 1.0}


def test_a_prompt_whose_answers_only_repeat_it_has_no_consensus() -> None:
    consensus = Consensus.of({LEMON: Asked("Say hello", ["Hello.", "hello"])})
    assert consensus.read(LEMON, ["Hello", "."]) == [0.0, 0.0]


def test_a_lone_prompt_has_one() -> None:
    assert Consensus.of({LEMON: Asked("?", ["Yellow."])}).read(LEMON, ["Yellow", "."]) == [0.0, 1.0]


def test_an_empty_consensus_hears_nothing_and_another_refuses_what_it_was_not_asked() -> None:
    assert Consensus().read((7,), ["Yellow", "."]) == [0.0, 0.0]
    with pytest.raises(KeyError):
        read("Yellow", prompt=(7,))


@given(st.lists(st.text(alphabet="aB .\u00e9", max_size=4), max_size=8))
def test_how_a_text_is_cut_into_tokens_does_not_change_what_it_says(pieces: list[str]) -> None:
    consensus = Consensus.of({LEMON: Asked("", ["a b", "ab"])})
    whole = sum(consensus.read(LEMON, ["".join(pieces)]))
    assert sum(consensus.read(LEMON, pieces)) == pytest.approx(whole)
