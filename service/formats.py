"""What exports write and imports read, a row at a time: Ratchet's own records, and the formats that others use. Pure.

A record is a vote, a ranking or a demonstration with all that it hangs on. `pairs` and `battles` hold less: they are made of
records here, and read back into records with what they lack filled in. Used by `exports.py` and `imports.py`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import combinations
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from service.pieces import FINISHED
from service.schemas import ChatMessage, Name, Text

Kind = Literal["votes", "pairs", "battles", "rankings", "demonstrations"]
Choice = Literal["first", "second", "tie", "neither"]
FileFormat = Literal["jsonl", "parquet"]
Row = dict[str, Any]
"""What a line of JSONL or a row of Parquet holds."""

JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
"""For objects with numbers of any size."""
IMPORT_ACCOUNT = "import"
"""The account of users that a format does not name, or names without an account."""
UNKNOWN_MODEL = "unknown"
MOST_TEXT_CHARACTERS = 1 << 20
MOST_USER_CHARACTERS = 200
MOST_SAMPLING_CHARACTERS = 4000
HUMAN = "\n\nHuman:"
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HEX_ID = re.compile(r"[0-9a-f]{32}")
WINNERS: dict[Choice, str] = {
    "first": "model_a",
    "second": "model_b",
    "tie": "tie",
    "neither": "tie (bothbad)",
}
CHOICES: dict[str, Choice] = {winner: choice for choice, winner in WINNERS.items()}


class FormatError(ValueError):
    """A row is not what its format asks for. `path` names the field. Never holds what the field said."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class LeftOut(Exception):
    """A row is right in its format, but Ratchet has no place for it. Its text is the reason; it is counted."""


# --- Ratchet's own records


def _read_json(value: object) -> object:
    """Parquet holds the object as text."""
    return from_json(value, allow_inf_nan=False) if isinstance(value, str) else value


def _storable(value: dict[str, Any]) -> dict[str, Any]:
    """What PostgreSQL takes and gives back as it was."""
    try:
        text = JSON.encode(value)
        text.encode()
    except ValueError:
        raise ValueError("must hold neither infinite numbers nor lone surrogates") from None
    if len(text) > MOST_SAMPLING_CHARACTERS or "\\u0000" in text:
        raise ValueError(f"must be at most {MOST_SAMPLING_CHARACTERS} characters of JSON, without NUL")
    return value


def _at_most(num: int, text: str) -> str:
    if len(text) > num:
        raise ValueError(f"must be at most {num} characters long")
    return text


Words = Annotated[Text, AfterValidator(partial(_at_most, MOST_TEXT_CHARACTERS))]
UserText = Annotated[Text, AfterValidator(partial(_at_most, MOST_USER_CHARACTERS))]
Time = Annotated[
    AwareDatetime,
    Field(strict=False, ge=datetime(1970, 1, 1, tzinfo=UTC), lt=datetime(2200, 1, 1, tzinfo=UTC)),
]
Number = Annotated[int, Field(ge=1, lt=1 << 62)]
Tokens = Annotated[int, Field(ge=0, lt=1 << 31)]
Sampling = Annotated[dict[str, JsonValue], BeforeValidator(_read_json), AfterValidator(_storable)]


class Record(BaseModel):
    """Base of all records: what is not known is refused, so that nothing is lost unseen."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class UserRecord(Record):
    """Whose something is."""

    account: UserText
    name: UserText


class Turn(Record):
    """One message of a prompt."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words


class ConversationRecord(Record):
    """The conversation that a prompt is a turn of. It is the prompt's user's."""

    id: Name
    created_at: Time


class PromptRecord(Record):
    """A prompt. One without a number gets the next."""

    id: Number | None
    user: UserRecord
    conversation: ConversationRecord | None
    messages: Annotated[list[Turn], Field(min_length=1)]
    created_at: Time


class ReplyRecord(Record):
    """A reply. `policy`: what the service, or the file it was once imported from, calls its author."""

    id: Name
    policy: Name | None
    sampling: Sampling
    content: Words | None
    finish_reason: Literal["stop", "length", "error", "abort"] | None
    prompt_tokens: Tokens | None
    completion_tokens: Tokens | None
    created_at: Time
    ended_at: Time | None


class ComparisonRecord(Record):
    """A comparison, its replies in the order shown."""

    id: Name
    user: UserRecord
    reason: Literal["always", "auto", "evaluation", "labeler", "import"]
    propensity: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    created_at: Time
    prompt: PromptRecord
    replies: Annotated[list[ReplyRecord], Field(min_length=2, max_length=100)]


class VoteRecord(Record):
    """A vote. One without a number gets the next."""

    id: Number | None
    user: UserRecord
    choice: Choice
    comment: Words | None
    tags: list[Words]
    created_at: Time
    updated_at: Time
    comparison: ComparisonRecord

    @model_validator(mode="after")
    def _between_two(self) -> "VoteRecord":
        if len(self.comparison.replies) != 2:
            raise ValueError("a vote is between two replies")
        return self


class RankingRecord(Record):
    """A ranking. Element i of `ranks` is the rank of reply i."""

    id: Number
    user: UserRecord
    ranks: list[Annotated[int, Field(ge=1, le=100)]]
    comment: Words | None
    tags: list[Words]
    created_at: Time
    updated_at: Time
    comparison: ComparisonRecord

    @model_validator(mode="after")
    def _all_ranked(self) -> "RankingRecord":
        if len(self.ranks) != len(self.comparison.replies):
            raise ValueError("each reply needs one rank")
        return self


class DemonstrationRecord(Record):
    """A demonstration. `corrects`: the reply that it corrects, where that still exists."""

    id: Name
    user: UserRecord
    content: Words
    corrected: Words | None
    corrects: ReplyRecord | None
    comment: Words | None
    tags: list[Words]
    created_at: Time
    prompt: PromptRecord


Feedback = VoteRecord | RankingRecord
AnyRecord = Feedback | DemonstrationRecord


# --- records into rows


def pairs_of_vote(record: Row) -> list[Row]:
    """The pair that a vote makes, in TRL's conversational format with explicit prompt; none where it prefers none."""
    order = {"first": (0, 1), "second": (1, 0)}.get(record["choice"])
    return [] if order is None else _pair(record, *order)


def pairs_of_ranking(record: Row) -> list[Row]:
    """A pair for every two replies of unequal rank, in the order of their positions."""
    ranked = combinations(enumerate(record["ranks"]), 2)
    orders = [(i, j) if a < b else (j, i) for (i, a), (j, b) in ranked if a != b]
    return [row for order in orders for row in _pair(record, *order)]


def _pair(record: Row, chosen: int, rejected: int) -> list[Row]:
    comparison = record["comparison"]
    texts = _texts([comparison["replies"][position] for position in (chosen, rejected)])
    if texts is None:
        return []
    return [
        {
            "prompt": comparison["prompt"]["messages"],
            "chosen": [{"role": "assistant", "content": texts[0]}],
            "rejected": [{"role": "assistant", "content": texts[1]}],
        }
    ]


def _texts(replies: Sequence[Row]) -> list[str] | None:
    """What two replies say; None where one has not finished, or both are the same, so that neither is better."""
    texts = [reply["content"] for reply in replies if reply["finish_reason"] in FINISHED]
    return texts if len(texts) == 2 and texts[0] != texts[1] else None


def battles_of_vote(record: Row) -> list[Row]:
    """FastChat's battle, the reply shown first being a's; none where a reply has not finished."""
    comparison = record["comparison"]
    texts = _texts(comparison["replies"])
    if texts is None:
        return []
    messages = comparison["prompt"]["messages"]
    first, second = ([*messages, {"role": "assistant", "content": text}] for text in texts)
    model_a, model_b = (reply["policy"] or UNKNOWN_MODEL for reply in comparison["replies"])
    return [
        {
            "question_id": comparison["id"].removeprefix("cmp-"),
            "model_a": model_a,
            "model_b": model_b,
            "winner": WINNERS[record["choice"]],
            "judge": _judge(**record["user"]),
            "conversation_a": first,
            "conversation_b": second,
            "turn": sum(message["role"] == "user" for message in messages),
            "anony": True,
            "language": "unknown",
            "tstamp": record["created_at"].timestamp(),
        }
    ]


def _judge(account: str, name: str) -> str:
    """A name that tells judges apart without naming them, as FastChat does; one that was imported stays as it is."""
    if account == IMPORT_ACCOUNT:
        return name
    return f"arena_user_{_digest(account, name)[:16]}"


def line(row: Row) -> bytes:
    """A line of JSONL, always the same for the same row. Times keep their zone: bring them in UTC."""
    return msgspec.json.encode(row) + b"\n"


# --- rows into records

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Source:
    """The file that rows come from: what gives ids, users and times to rows that name none."""

    name: str
    sha256: str
    at: datetime

    @property
    def user(self) -> UserRecord:
        """Whose the rows are that name no user."""
        return UserRecord(account=IMPORT_ACCOUNT, name=self.name)


def read_line(content: bytes) -> Row:
    """Raises FormatError."""
    try:
        row = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise FormatError("", f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise FormatError("", "must be a JSON object; a file holds one on each line")
    return row


def reader(kind: Kind, source: Source) -> Callable[[int, Row], AnyRecord]:
    """What turns a row and its number into a record. It raises FormatError and LeftOut."""
    if kind == "pairs":
        return partial(_read_pair, source)
    if kind == "battles":
        return partial(_read_battle, source)
    if kind == "votes":
        return lambda _, row: _validate(VoteRecord, row)
    if kind == "rankings":
        return lambda _, row: _validate(RankingRecord, row)
    return lambda _, row: _validate(DemonstrationRecord, row)


def _validate(model: type[Model], row: object) -> Model:
    try:
        return model.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise FormatError(path, first["msg"].removeprefix("Value error, ")) from None


class _Message(ChatMessage):
    """A message of any length that is stored."""

    @field_validator("content")
    @classmethod
    def _not_too_long(cls, content: str) -> str:
        return _at_most(MOST_TEXT_CHARACTERS, content)


class _Conversations(BaseModel):
    """TRL's conversational pair; the prompt may lie within both sides (implicit)."""

    prompt: list[_Message] = Field(default_factory=list)
    chosen: Annotated[list[_Message], Field(min_length=1)]
    rejected: Annotated[list[_Message], Field(min_length=1)]


class _Texts(BaseModel):
    """TRL's standard pair, and Anthropic's HH-RLHF."""

    prompt: Words = ""
    chosen: Words
    rejected: Words


class _Battle(BaseModel):
    """What is used of FastChat's battle."""

    question_id: str | int | None = None
    model_a: Name
    model_b: Name
    winner: Literal["model_a", "model_b", "tie", "tie (bothbad)"]
    judge: Name | Annotated[int, Field(strict=True)] | None = None
    conversation_a: Annotated[list[_Message], Field(min_length=1)]
    conversation_b: Annotated[list[_Message], Field(min_length=1)]
    tstamp: Annotated[float, Field(ge=0, lt=7e9, allow_inf_nan=False)] | None = None


def _read_pair(source: Source, number: int, row: Row) -> VoteRecord:
    prompt, chosen, rejected = _split(*_sides(row))
    comparison_id = f"cmp-{_digest(source.sha256, str(number))}"
    # Which is shown first says nothing of which is better, but is the same whenever the file is read.
    swapped = int(_digest(comparison_id)[0], 16) % 2 == 1
    return _vote(
        source.user,
        source.at,
        comparison_id,
        prompt,
        (rejected, chosen) if swapped else (chosen, rejected),
        (None, None),
        "second" if swapped else "first",
    )


def _sides(row: Row) -> tuple[Sequence[ChatMessage], Sequence[ChatMessage]]:
    """The whole conversation with the chosen reply and with the rejected one, from any of the shapes."""
    given = {name: row[name] for name in ("prompt", "chosen", "rejected") if row.get(name) is not None}
    if all(isinstance(value, list) for value in given.values()):
        pair = _validate(_Conversations, given)
        return [*pair.prompt, *pair.chosen], [*pair.prompt, *pair.rejected]
    if not all(isinstance(value, str) for value in given.values()):
        raise FormatError("", "prompt, chosen and rejected must all be texts, or all be lists of messages")
    texts = _validate(_Texts, given)
    chosen, rejected = texts.prompt + texts.chosen, texts.prompt + texts.rejected
    if chosen.startswith(HUMAN) and rejected.startswith(HUMAN):
        return _read_hh(chosen), _read_hh(rejected)
    if not texts.prompt:
        raise FormatError(
            "prompt", "is missing; texts without one must begin with two line ends and 'Human:'"
        )
    asked = ChatMessage(role="user", content=texts.prompt)
    return [asked, _said(texts.chosen)], [asked, _said(texts.rejected)]


def _said(text: str) -> ChatMessage:
    return ChatMessage(role="assistant", content=text)


def _read_hh(text: str) -> list[ChatMessage]:
    """HH-RLHF's transcript as messages."""
    _, *parts = HH_TURN.split(text)
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    said = [part.strip() for part in parts[1::2]]
    return [ChatMessage.model_validate({"role": r, "content": c}) for r, c in zip(roles, said, strict=True)]


def _split(one: Sequence[ChatMessage], other: Sequence[ChatMessage]) -> tuple[list[ChatMessage], str, str]:
    """The prompt that two conversations share, and the two replies. Raises LeftOut where they are not of that form."""
    *prompt, first = one
    *other_prompt, second = other
    if prompt != other_prompt:
        raise LeftOut("the two sides differ before the last message")
    if (first.role, second.role) != ("assistant", "assistant"):
        raise LeftOut("the last message is not the assistant's")
    if not prompt or prompt[-1].role != "user":
        raise LeftOut("the message before the reply is not the user's")
    if first.content == second.content:
        raise LeftOut("the two replies are the same")
    return prompt, first.content, second.content


def _read_battle(source: Source, number: int, row: Row) -> VoteRecord:
    battle = _validate(_Battle, row)
    prompt, first, second = _split(battle.conversation_a, battle.conversation_b)
    known = isinstance(battle.question_id, str) and HEX_ID.fullmatch(battle.question_id)
    # Other question ids may name a question that was put to many.
    comparison_id = f"cmp-{battle.question_id if known else _digest(source.sha256, str(number))}"
    user = source.user
    if battle.judge is not None:
        user = UserRecord(account=IMPORT_ACCOUNT, name=str(battle.judge))
    at = source.at if battle.tstamp is None else datetime.fromtimestamp(battle.tstamp, UTC)
    policies = (battle.model_a, battle.model_b)
    return _vote(user, at, comparison_id, prompt, (first, second), policies, CHOICES[battle.winner])


def _vote(
    user: UserRecord,
    at: datetime,
    comparison_id: str,
    prompt: list[ChatMessage],
    texts: tuple[str, str],
    policies: tuple[str | None, str | None],
    choice: Choice,
) -> VoteRecord:
    """The record of a vote of which only this is known."""
    replies = [
        _reply(f"chatcmpl-{_digest(comparison_id, str(position))}", policy, text, at)
        for position, (text, policy) in enumerate(zip(texts, policies, strict=True))
    ]
    turns = [Turn(role=_stored_role(message.role), content=message.content) for message in prompt]
    asked = PromptRecord(id=None, user=user, conversation=None, messages=turns, created_at=at)
    comparison = ComparisonRecord(
        id=comparison_id,
        user=user,
        reason="import",
        propensity=1.0,
        created_at=at,
        prompt=asked,
        replies=replies,
    )
    return VoteRecord(
        id=None,
        user=user,
        choice=choice,
        comment=None,
        tags=[],
        created_at=at,
        updated_at=at,
        comparison=comparison,
    )


def _reply(reply_id: str, policy: str | None, text: str, at: datetime) -> ReplyRecord:
    return ReplyRecord(
        id=reply_id,
        policy=policy,
        sampling={},
        content=text,
        finish_reason="stop",
        prompt_tokens=None,
        completion_tokens=None,
        created_at=at,
        ended_at=at,
    )


def _stored_role(role: str) -> Any:
    """As chat stores it: many chat templates know no role `developer`, OpenAI's newer name of `system`."""
    return "system" if role == "developer" else role


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
