"""How judgements become pairs, what they weigh, and what is held out."""

import itertools
from pathlib import Path

import pytest

from tests.tiny_model import make_model
from trainer.models import Roles
from trainer.preferences import Pair, Preferences, Source, from_ranks, read, split
from trainer.snapshot import Feedback


def vote(user: str, content: str, ranks: list[int] | None = None) -> Feedback:
    messages = [{"role": "user", "content": content}]
    return Feedback("vote", "1", user, messages, ["yes", "no"], ranks or [1, 2], ["policy-000000"] * 2, False)


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    folder: Path = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    return Roles.load(folder, rank=4)


def test_a_ranking_is_all_its_pairs_and_weighs_as_much_as_one_vote() -> None:
    replies = [[1], [2], [3], [4]]
    pairs = from_ranks([0], replies, [2, 1, 2, 3], Source("g"))
    assert len(pairs) == 6
    assert sum(pair.weight for pair in pairs) == pytest.approx(1.0)
    found = {(pair.first[0], pair.second[0]): pair.label for pair in pairs}
    assert found == {(1, 2): 0.0, (1, 3): 0.5, (1, 4): 1.0, (2, 3): 1.0, (2, 4): 1.0, (3, 4): 1.0}


def test_each_kind_of_feedback_has_its_place(roles: Roles) -> None:
    messages = [{"role": "user", "content": "so?"}]
    neither = Feedback("vote", "2", "bob", messages, ["a", "b"], None, [None, None], False)
    corrected = Feedback(
        "demonstration", "d", "eve", messages, ["right", "wrong"], [1, 2], [None, None], False
    )
    written = Feedback("demonstration", "e", "eve", messages, ["own"], [1], [None], True)
    lesson = read(roles, [vote("ann", "so?"), neither, corrected, written], votes_per_user=10)
    assert [pair.source.cohort for pair in lesson.preferences.pairs] == ["vote", "demonstration"]
    assert [roles.decode(each.reply) for each in lesson.preferences.dislikes] == ["a", "b"]
    assert sum(each.weight for each in lesson.preferences.dislikes) == 1.0
    assert [roles.decode(each.reply) for each in lesson.demonstrations] == ["right", "own"]
    assert [each.source.cohort for each in lesson.demonstrations] == ["demonstration", "import"]


def test_an_empty_reply_is_learnt_from_and_one_longer_than_the_context_left_out(roles: Roles) -> None:
    messages = [{"role": "user", "content": "so?"}]
    long = "word " * roles.context_tokens
    feedback = [
        Feedback("vote", str(n), "ann", messages, [text, "no"], [1, 2], [None, None], False)
        for n, text in enumerate(["", long])
    ]
    lesson = read(roles, feedback, votes_per_user=10)
    assert lesson.too_long == 1
    assert [pair.first for pair in lesson.preferences.pairs] == [[roles.end_ids[0]]]


def test_prompts_that_nobody_judged_are_for_the_policy_alone(roles: Roles) -> None:
    def asked(content: str) -> Feedback:
        return Feedback("prompt", "1", "ann", [{"role": "user", "content": content}], [], None, [], False)

    feedback = [vote("ann", "so?"), asked("why?"), asked("word " * roles.context_tokens), asked("why?")]
    lesson = read(roles, feedback, votes_per_user=1)
    so, why = (roles.prompt_ids([{"role": "user", "content": content}]) for content in ("so?", "why?"))
    assert lesson.preferences.prompts == [so, why, why]
    assert lesson.too_long == 1
    assert [source.weight for source in lesson.preferences.sources] == [1.0]
    assert lesson.preferences.where(lambda source: True).prompts == [so]


def test_a_user_with_many_votes_counts_no_more_than_the_cap(roles: Roles) -> None:
    feedback = [vote("many", f"q{n}") for n in range(30)] + [vote("few", f"r{n}") for n in range(3)]
    pairs = read(roles, feedback, votes_per_user=10).preferences.pairs
    assert sum(pair.weight for pair in pairs if pair.source.user == "many") == pytest.approx(10)
    assert sum(pair.weight for pair in pairs if pair.source.user == "few") == pytest.approx(3)


def preferences(users: int, votes: int, prompts: int) -> Preferences:
    numbers = itertools.product(range(users), range(votes))
    pairs = [
        Pair([1], [2], [3], 1.0, Source(f"prompt {(7 * user + number) % prompts}", f"user {user}"))
        for user, number in numbers
    ]
    return Preferences(pairs, [])


def test_what_is_held_out_shares_no_user_with_training_and_no_prompt_with_what_is_measured() -> None:
    parts = split(preferences(users=10, votes=12, prompts=60), 0.2, seed=3)
    assert parts.by == "user and prompt"
    assert (len(parts.held_out.pairs), len(parts.train.pairs)) == (24, 96)
    assert 0 < len(parts.unlike.pairs) < 96

    def names(part: Preferences, name: str) -> set[str]:
        return {getattr(pair.source, name) for pair in part.pairs}

    assert not names(parts.train, "user") & names(parts.held_out, "user")
    assert not names(parts.unlike, "group") & names(parts.held_out, "group")


def test_where_all_users_ask_the_same_users_alone_are_held_out() -> None:
    parts = split(preferences(users=10, votes=12, prompts=3), 0.2, seed=3)
    assert parts.by == "user"
    assert parts.unlike is parts.train


def test_with_few_users_prompts_are_held_out() -> None:
    parts = split(preferences(users=1, votes=30, prompts=10), 0.2, seed=3)
    assert parts.by == "prompt"
    assert len(parts.train.pairs) + len(parts.held_out.pairs) == 30
    assert len(parts.held_out.pairs) == 6


def test_a_user_who_gave_more_than_half_is_never_held_out() -> None:
    many = preferences(users=1, votes=50, prompts=50).pairs
    few = [Pair([1], [2], [3], 1.0, Source(f"p {n}", f"few {n % 6}")) for n in range(30)]
    parts = split(Preferences([*many, *few], []), 0.2, seed=1)
    assert "user 0" not in {pair.source.user for pair in parts.held_out.pairs}
    assert parts.held_out.pairs
