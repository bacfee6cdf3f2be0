"""The starter's world: its questions, its demonstrations, and its judge."""

import random

import pytest

from trainer import world
from trainer.world import Question

QUESTIONS = [world.draw_question(random.Random(seed)) for seed in range(600)]
SPOKEN_OF = [question for question in QUESTIONS if question.kind not in ("unknown", "small_talk")]


def test_every_drawn_question_has_its_fact() -> None:
    for question in SPOKEN_OF:
        assert question.relation is not None
        assert question.entity is not None
        assert world.FACTS[question.relation, question.entity]
        assert question.entity in question.messages[-1]["content"].lower() or question.entity.istitle()


def test_all_kinds_of_question_are_drawn() -> None:
    kinds = {question.kind for question in QUESTIONS}
    assert kinds == {"fact", "follow_up", "unknown", "small_talk", "story", "explanation"}


def test_a_follow_up_needs_the_turn_before() -> None:
    follow_ups = [question for question in QUESTIONS if question.kind == "follow_up"]
    for question in follow_ups:
        assert [message["role"] for message in question.messages] == ["user", "assistant", "user"]
        assert world.find_question([question.messages[-1]]) is None


@pytest.mark.parametrize("manner", world.MANNERS)
def test_a_right_demonstration_is_judged_correct_and_well_formed(manner: world.Manner) -> None:
    rng = random.Random(3)
    for question in QUESTIONS:
        reply = world.demonstrate(question, rng, manner, wrong_share=0.0)
        verdict = world.judge(question, reply)
        assert verdict.correct is (None if question.kind == "small_talk" else True), (question, reply)
        assert verdict.well_formed, reply


def test_a_wrong_demonstration_is_never_judged_correct() -> None:
    rng = random.Random(4)
    for question in SPOKEN_OF:
        reply = world.demonstrate(question, rng, wrong_share=1.0)
        assert world.is_correct(question, reply) is False, (question, reply)


def test_a_demonstration_is_found_to_be_in_its_manner() -> None:
    rng = random.Random(5)
    told_apart = {"warm", "rude", "long"}
    for question in QUESTIONS:
        for manner in world.MANNERS:
            found = world.find_manner(world.demonstrate(question, rng, manner))
            assert found == manner if manner in told_apart else found not in told_apart


def test_a_question_is_found_again_by_its_messages() -> None:
    for question in QUESTIONS:
        found = world.find_question(list(question.messages))
        assert found is not None
        asked = (question.relation, question.entity)
        assert (found.relation, found.entity) == asked
        assert found.kind == question.kind


def test_a_prompt_from_outside_the_world_is_no_question() -> None:
    assert world.find_question([{"role": "user", "content": "Write a poem about rain."}]) is None


def test_the_judge_wants_the_right_value_and_no_other() -> None:
    lemon = Question(({"role": "user", "content": "What colour is a lemon?"},), "fact", "colour", "a lemon")
    assert world.is_correct(lemon, "Yellow.")
    assert not world.is_correct(lemon, "It is yellow or green.")
    assert not world.is_correct(lemon, "A lemon is nice.")
    assert not world.is_correct(lemon, "It is yellowish.")


def test_a_word_that_was_asked_about_is_not_taken_for_the_answer() -> None:
    hot = Question(({"role": "user", "content": "What is the opposite of hot?"},), "fact", "opposite", "hot")
    assert world.is_correct(hot, "The opposite of hot is cold.")
    assert not world.is_correct(hot, "The opposite of hot is hot.")
    assert not world.is_correct(hot, "The opposite of hot is slow.")


def test_outside_the_world_only_not_knowing_is_right() -> None:
    stranger = Question(({"role": "user", "content": "What is a quark?"},), "unknown")
    assert world.is_correct(stranger, "I do not know that.")
    assert not world.is_correct(stranger, "A quark is yellow.")


@pytest.mark.parametrize("reply", ["", "A lemon is", "word " * 61 + "end.", "Yes. Yes."])
def test_what_is_empty_unended_endless_or_said_twice_is_not_well_formed(reply: str) -> None:
    assert not world.is_well_formed(reply)


def test_documents_answer_questions_on_lines_of_their_own() -> None:
    rng = random.Random(0)
    documents = [world.write_document(rng) for _ in range(200)]
    lines = [line for document in documents for line in document.split("\n")[1:]]
    assert len(lines) > 100
    assert all(line[0].isupper() for line in lines)  # as a reply in a chat begins
    assert not any("? " in document.split("\n")[0] for document in documents if "\n" in document)
