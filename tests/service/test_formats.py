"""The formats of exports and imports, without a database."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.formats import (
    DemonstrationRecord,
    FormatError,
    Kind,
    LeftOut,
    Row,
    Source,
    VoteRecord,
    battles_of_vote,
    line,
    pairs_of_ranking,
    pairs_of_vote,
    read_line,
    reader,
)

AT = datetime(2026, 11, 21, 10, 30, 0, 250_000, UTC)
SOURCE = Source("hh", "0" * 64, AT)
ASKED = [{"role": "user", "content": "What color is the sky?"}]
BLUE = [{"role": "assistant", "content": "It is blue."}]
GREEN = [{"role": "assistant", "content": "It is green."}]


def reply(number: int, content: str | None, policy: str | None = "policy-000001", **changes: Any) -> Row:
    return {
        "id": f"chatcmpl-{number:032x}",
        "policy": policy,
        "sampling": {"temperature": 1.0, "stop": [], "seed": None},
        "content": content,
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "created_at": AT,
        "ended_at": AT,
        **changes,
    }


def comparison(*replies: Row, messages: list[Row] = ASKED) -> Row:
    ada = {"account": "", "name": "ada"}
    asked = {"id": 5, "user": ada, "conversation": None, "messages": messages, "created_at": AT}
    return {
        "id": f"cmp-{1:032x}",
        "user": ada,
        "reason": "auto",
        "propensity": 0.25,
        "created_at": AT,
        "prompt": asked,
        "replies": list(replies),
    }


def vote(choice: str, *replies: Row, account: str = "", **changes: Any) -> Row:
    shown = replies or (reply(1, "It is blue."), reply(2, "It is green."))
    return {
        "id": 17,
        "user": {"account": account, "name": "ada"},
        "choice": choice,
        "comment": None,
        "tags": [],
        "created_at": AT,
        "updated_at": AT,
        "comparison": comparison(*shown),
        **changes,
    }


def read(kind: Kind, row: Row, number: int = 1) -> Any:
    return reader(kind, SOURCE)(number, row)


def refusal(kind: Kind, row: Row) -> str:
    with pytest.raises(FormatError) as refused:
        read(kind, row)
    return str(refused.value)


# --- rows that are written


@pytest.mark.parametrize(("choice", "chosen"), [("first", BLUE), ("second", GREEN)])
def test_a_vote_makes_trls_conversational_pair_with_explicit_prompt(choice: str, chosen: list[Row]) -> None:
    rejected = GREEN if chosen is BLUE else BLUE
    assert pairs_of_vote(vote(choice)) == [{"prompt": ASKED, "chosen": chosen, "rejected": rejected}]


@pytest.mark.parametrize("choice", ["tie", "neither"])
def test_a_vote_that_prefers_none_makes_no_pair(choice: str) -> None:
    assert pairs_of_vote(vote(choice)) == []


@pytest.mark.parametrize(
    "second", [reply(2, "It is bl", finish_reason="error"), reply(2, None), reply(2, "It is blue.")]
)
def test_replies_that_failed_or_are_the_same_make_no_pair_and_no_battle(second: Row) -> None:
    second = second if second["content"] else second | {"finish_reason": None}
    record = vote("first", reply(1, "It is blue."), second)
    assert pairs_of_vote(record) == battles_of_vote(record) == []


def test_a_ranking_makes_a_pair_of_every_two_that_it_tells_apart() -> None:
    replies = [reply(number, text) for number, text in enumerate("abc")]
    ranking = vote("", *replies) | {"ranks": [2, 1, 2]}
    pairs = pairs_of_ranking(ranking)
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs] == [
        ("b", "a"),
        ("b", "c"),
    ]


@pytest.mark.parametrize(
    ("choice", "winner"),
    [("first", "model_a"), ("second", "model_b"), ("tie", "tie"), ("neither", "tie (bothbad)")],
)
def test_a_vote_makes_fastchats_battle(choice: str, winner: str) -> None:
    record = vote(choice, reply(1, "It is blue.", "gpt"), reply(2, "It is green.", None), account="import")
    assert battles_of_vote(record) == [
        {
            "question_id": f"{1:032x}",
            "model_a": "gpt",
            "model_b": "unknown",
            "winner": winner,
            "judge": "ada",
            "conversation_a": ASKED + BLUE,
            "conversation_b": ASKED + GREEN,
            "turn": 1,
            "anony": True,
            "language": "unknown",
            "tstamp": 1795257000.25,
        }
    ]


def test_a_battle_tells_judges_apart_without_naming_them() -> None:
    users = [("", "ada"), ("", "bob"), ("acme", "ada")]
    judges = [
        battles_of_vote(vote("tie") | {"user": {"account": account, "name": name}})[0]["judge"]
        for account, name in users
    ]
    assert len(set(judges)) == 3
    assert all(judge.startswith("arena_user_") and "ada" not in judge for judge in judges)


def test_a_line_is_short_and_readable() -> None:
    written = '{"at":"2026-11-21T10:30:00.250000Z","text":"é\u2028\\n"}\n'
    assert line({"at": AT, "text": "é\u2028\n"}) == written.encode()


# --- rows that are read


def test_a_complete_record_is_read_as_it_was_written() -> None:
    record = vote("first", comment="warm", tags=["tone"])
    assert read("votes", read_line(line(record))).model_dump() == record


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN},
        {"chosen": ASKED + BLUE, "rejected": ASKED + GREEN},
        {"chosen": ASKED + BLUE, "rejected": ASKED + GREEN, "prompt": None, "score_chosen": 8.5},
        {"prompt": "What color is the sky?", "chosen": "It is blue.", "rejected": "It is green."},
        {
            "chosen": "\n\nHuman: What color is the sky?\n\nAssistant: It is blue.",
            "rejected": "\n\nHuman: What color is the sky?\n\nAssistant: It is green.",
        },
        {
            "prompt": "\n\nHuman: What color is the sky?\n\nAssistant:",
            "chosen": " It is blue.",
            "rejected": " It is green.",
        },
    ],
    ids=["explicit", "implicit", "with more columns", "standard", "HH-RLHF", "HH-RLHF with prompt"],
)
def test_every_shape_of_a_pair_is_read_as_the_same(row: Row) -> None:
    assert pairs_of_vote(read("pairs", row).model_dump()) == [
        {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN}
    ]


def test_a_transcript_of_several_turns_is_read_turn_by_turn() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello, Human: what is it?\n\nHuman: Why?\nTell me.\n\nAssistant:"
    read_row = read("pairs", {"chosen": start + " So.", "rejected": start + " Because."}).model_dump()
    assert read_row["comparison"]["prompt"]["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, Human: what is it?"},
        {"role": "user", "content": "Why?\nTell me."},
    ]


def test_a_pair_is_shown_in_either_order_and_belongs_to_the_import() -> None:
    row = {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN}
    records = [read("pairs", row, number) for number in range(1, 41)]
    assert {record.choice for record in records} == {"first", "second"}
    assert len({record.comparison.id for record in records}) == 40
    assert records == [read("pairs", row, number) for number in range(1, 41)]
    record = records[0]
    assert (record.user.account, record.user.name, record.created_at) == ("import", "hh", AT)
    assert (record.comparison.reason, record.comparison.propensity) == ("import", 1.0)
    assert [reply.policy for reply in record.comparison.replies] == [None, None]


def test_a_foreign_battle_is_read_with_what_it_says() -> None:
    row = battles_of_vote(vote("neither"))[0] | {"language": "English", "toxic_chat_tag": {}, "judge": 7}
    record = read("battles", row)
    assert (record.comparison.id, record.choice) == (f"cmp-{1:032x}", "neither")
    assert (record.user.account, record.user.name, record.created_at) == ("import", "7", AT)
    ids = {read("battles", row | {"question_id": 81}, number).comparison.id for number in (1, 2)}
    assert len(ids) == 2  # a question's number, put to many, is no battle's id


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": ASKED + BLUE, "rejected": [*ASKED, *BLUE, *ASKED, *GREEN]}, "differ before the last"),
        ({"prompt": ASKED, "chosen": BLUE, "rejected": BLUE}, "the same"),
        ({"chosen": BLUE, "rejected": GREEN}, "not the user's"),
        ({"prompt": ASKED, "chosen": ASKED, "rejected": ASKED}, "not the assistant's"),
        (
            {"chosen": "\n\nHuman: a\n\nHuman: b", "rejected": "\n\nHuman: a\n\nHuman: c"},
            "not the assistant's",
        ),
    ],
)
def test_a_pair_that_has_no_place_is_left_out_with_the_reason(row: Row, reason: str) -> None:
    with pytest.raises(LeftOut, match=reason):
        read("pairs", row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "chosen: Field required"),
        ({"prompt": "a", "chosen": "b"}, "rejected: Field required"),
        ({"prompt": "a", "chosen": ASKED + BLUE, "rejected": ASKED + GREEN}, "must all be texts, or all be lists"),
        ({"chosen": BLUE, "rejected": "c"}, "must all be texts, or all be lists"),
        ({"chosen": 1, "rejected": 2}, "must all be texts, or all be lists"),
        ({"chosen": "b", "rejected": "c"}, "prompt: is missing"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "prompt: is missing"),
        ({"prompt": ASKED, "chosen": [{"role": "assistant"}], "rejected": GREEN}, "chosen.0.content: Field required"),
        ({"prompt": ASKED, "chosen": [{"role": "tool", "content": "x"}], "rejected": GREEN}, "chosen.0.role: Input"),
        ({"prompt": ASKED, "chosen": [], "rejected": GREEN}, "chosen: List should have at least 1 item"),
        ({"prompt": "a\0", "chosen": "b", "rejected": "c"}, "prompt: must not hold NUL"),
        ({"prompt": "a", "chosen": "b" * (1 << 20 | 1), "rejected": "c"}, "chosen: must be at most 1048576"),
        (
            {"prompt": ASKED, "chosen": [{"role": "assistant", "content": "b" * (1 << 20 | 1)}], "rejected": GREEN},
            "chosen.0.content: must be at most 1048576 characters",
        ),
    ],
)  # fmt: skip
def test_a_wrong_pair_is_refused_by_field(row: Row, message: str) -> None:
    assert message in refusal("pairs", row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice": "third"}, "choice: Input should be 'first', 'second', 'tie' or 'neither'"),
        ({"id": 1 << 62}, "id: Input should be less than"),
        ({"id": "17"}, "id: Input should be a valid integer"),
        ({"comment": "\0"}, "comment: must not hold NUL"),
        ({"comment": "\ud800"}, "comment: must not hold lone surrogates"),
        ({"created_at": datetime(2026, 1, 1)}, "created_at: Input should have timezone info"),
        ({"created_at": "0001-01-01T00:00:00Z"}, "created_at: Input should be greater than or equal to"),
        ({"created_at": "yesterday"}, "created_at: Input should be a valid datetime"),
        ({"policy": "x"}, "policy: Extra inputs are not permitted"),
        ({"comparison": comparison(reply(1, "a"))}, "comparison.replies: List should have at least 2 items"),
        ({"comparison": comparison(*[reply(n, "a") for n in range(3)])}, "a vote is between two replies"),
        ({"comparison": comparison() | {"propensity": 0.0}}, "comparison.propensity: Input should be greater than 0"),
        ({"user": {"account": "", "name": "x" * 201}}, "user.name: must be at most 200"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_refused_by_field(changes: Row, message: str) -> None:
    assert refusal("votes", vote("first") | changes).startswith(message)


@pytest.mark.parametrize(
    "sampling", [{"x": float("inf")}, {"x": "\ud800"}, {"x": "\0"}, {"x": "y" * 4000}, [], "{", None]
)
def test_sampling_that_could_not_be_given_back_is_refused(sampling: object) -> None:
    record = vote("first", reply(1, "a", sampling=sampling), reply(2, "b"))
    assert refusal("votes", record).startswith("comparison.replies.0.sampling")


def test_a_ranking_needs_a_rank_for_each_reply() -> None:
    ranking = vote("first") | {"ranks": [1, 2, 3]}
    del ranking["choice"]
    assert refusal("rankings", ranking) == "each reply needs one rank"


def test_a_refusal_never_says_what_the_field_held() -> None:
    assert "lemon" not in refusal("votes", vote("first") | {"choice": "lemon"})
    assert "lemon" not in refusal("pairs", {"prompt": "lemon", "chosen": ["lemon"], "rejected": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b'"text"', "must be a JSON object"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": NaN}', "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b'{"a": "\\ud800"}', "is not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_line(content)


# --- there and back

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
TIMES = st.datetimes(datetime(1970, 1, 1), datetime(2190, 1, 1), timezones=st.just(UTC))


@st.composite
def votes(draw: st.DrawFn) -> Row:
    first, second = draw(st.lists(TEXTS, min_size=2, max_size=2, unique=True))
    turns = draw(st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=4))
    messages = [{"role": role, "content": draw(TEXTS)} for role in [*turns, "user"]]
    shown = comparison(
        reply(1, first, draw(st.none() | st.text("abc", min_size=1))), reply(2, second), messages=messages
    )
    return vote(
        draw(st.sampled_from(["first", "second", "tie", "neither"])),
        id=draw(st.integers(1, 1 << 61)),
        user={"account": draw(TEXTS), "name": draw(TEXTS)},
        comment=draw(st.none() | TEXTS),
        tags=draw(st.lists(TEXTS)),
        created_at=draw(TIMES),
        comparison=shown,
    )


@given(votes())
def test_votes_keep_everything(record: Row) -> None:
    written = line(record)
    assert line(read("votes", read_line(written)).model_dump()) == written


@given(votes())
def test_battles_and_pairs_keep_everything_that_they_hold(record: Row) -> None:
    for kind, rows_of in (("battles", battles_of_vote), ("pairs", pairs_of_vote)):
        for row in rows_of(record):
            again: VoteRecord = read(kind, read_line(line(row)))  # type: ignore[arg-type]
            assert [line(row) for row in rows_of(again.model_dump())] == [line(row)]


def test_a_demonstration_keeps_the_reply_that_it_corrects() -> None:
    record = {
        "id": "dem-1",
        "user": {"account": "", "name": "lea"},
        "content": "It is blue.",
        "corrected": "It is green.",
        "corrects": reply(2, "It is green."),
        "comment": None,
        "tags": [],
        "created_at": AT,
        "prompt": comparison()["prompt"],
    }
    again = read("demonstrations", read_line(line(record)))
    assert isinstance(again, DemonstrationRecord)
    assert again.model_dump() == record
    assert json.loads(line(again.model_dump())) == json.loads(line(record))
