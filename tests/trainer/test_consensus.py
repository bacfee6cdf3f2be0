"""What answers have in common, and what a reply says of it, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.consensus import Asked, Consensus, Said

LEMON, CHERRY = (1, 2), (1, 3)
ANSWERS = ["A lemon is yellow.", "Yellow.", "A lemon is yellow!", "A lemon is green."]
CONSENSUS = Consensus.of(
    {
        LEMON: Asked("What colour is a lemon?", ANSWERS),
        CHERRY: Asked("And cherries?", ["Red.", "Red."]),
    }
)
RARE = math.log(3 / 1.5)  # of two prompts, one has the word
UNHEARD = math.log(3 / 0.5)


def read(*pieces: str, prompt: tuple[int, ...] = LEMON) -> list[Said]:
    return CONSENSUS.read(prompt, pieces)


def total(said: list[Said]) -> tuple[float, float]:
    return sum(each.rarity for each in said), sum(each.agreed for each in said)


def test_a_word_counts_by_the_answers_that_have_it_and_the_prompts_own_do_not() -> None:
    """Yellow is in three of four answers, green in one; `a`, `lemon` and `is` are in the prompt."""
    plain = read("A", " lemon", " is", " yellow", ".", "")
    assert total(plain) == pytest.approx((RARE, 0.75 * RARE))
    wrong = read("A", " lemon", " is", " green", ".", "")
    assert total(wrong) == pytest.approx((RARE, 0.25 * RARE))


def test_the_same_word_in_other_letters_and_other_tokens_is_the_same_word() -> None:
    curt = read("Y", "ell", "ow", ".", "")
    assert total(curt) == pytest.approx((RARE, 0.75 * RARE))


def test_a_word_belongs_to_the_token_by_which_it_has_ended() -> None:
    assert [bool(each.rarity) for each in read(" yel", "low", ".", "")] == [False, False, True, False]
    assert [bool(each.rarity) for each in read(" yel", "low.", "")] == [False, True, False]
    assert [bool(each.rarity) for each in read(" yel", "low")] == [False, True]  # cut off


def test_a_word_that_is_said_again_says_nothing_new() -> None:
    assert total(read("yellow", " yellow", "!", "")) == pytest.approx((RARE, 0.75 * RARE))


def test_a_word_that_no_answer_has_is_the_rarest_and_agrees_with_nothing() -> None:
    assert total(read("Cheers", "!", "")) == pytest.approx((UNHEARD, 0.0))


def test_words_that_end_with_one_token_are_added() -> None:
    [both, end] = read("yellow, green.", "")
    assert (both.rarity, both.agreed) == pytest.approx((2 * RARE, RARE))
    assert end == Said()


def test_an_empty_reply_says_nothing() -> None:
    assert read() == []
    assert read("") == [Said()]


def test_what_every_prompt_has_is_a_templates_and_no_prompts_own() -> None:
    consensus = Consensus.of({LEMON: Asked("user: a lemon", []), CHERRY: Asked("user: a cherry", [])})
    assert consensus.own == {LEMON: {"lemon"}, CHERRY: {"cherry"}}


def test_scripts_without_spaces_are_read_by_the_character() -> None:
    consensus = Consensus.of({LEMON: Asked("", ["\u9ec4\u8272"]), CHERRY: Asked("?", ["\u7ea2\u8272"])})
    assert consensus.shares[LEMON] == {"\u8272": 1.0, "\u9ec4": 1.0}


def test_a_prompt_whose_answers_only_repeat_it_has_no_consensus() -> None:
    consensus = Consensus.of({LEMON: Asked("Say hello", ["Hello.", "hello"])})
    assert total(consensus.read(LEMON, ["Hello", "."])) == (0.0, 0.0)


def test_an_empty_consensus_hears_nothing_and_another_refuses_what_it_was_not_asked() -> None:
    assert Consensus().read((7,), ["Yellow", "."]) == [Said(), Said()]
    with pytest.raises(KeyError):
        read("Yellow", prompt=(7,))


@given(st.lists(st.text(alphabet="aB .\u00e9", max_size=4), max_size=8))
def test_how_a_text_is_cut_into_tokens_does_not_change_what_it_says(pieces: list[str]) -> None:
    consensus = Consensus.of({LEMON: Asked("", ["a b", "ab"])})
    whole = total(consensus.read(LEMON, ["".join(pieces)]))
    assert total(consensus.read(LEMON, pieces)) == pytest.approx(whole)
