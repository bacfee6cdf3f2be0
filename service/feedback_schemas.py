"""What people say of replies and what is kept of them, as it goes over the wire. Validation only."""

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from service.operator_schemas import Role
from service.schemas import NUMBER, AtLeastOne, Flag, Messages, Name, Text

MOST_REPLIES = 9
MOST_MARKDOWN = 100_000
"""Reading Markdown takes a core a few seconds per million characters."""
SAYS_SOMETHING = r"^[^\u0000]*[^\s\u0000\u001c-\u001f\u0085][^\u0000]*$"
"""Text that is not white space alone, by Python's notion of it, in a regular expression that JavaScript reads alike."""
Choice = Literal["first", "second", "tie", "neither"]
Comment = Annotated[Text, Field(max_length=4000)]
Tags = Annotated[list[Annotated[Text, Field(min_length=1, max_length=64)]], Field(max_length=16)]
VOTING_USER = "The `user` of the chat request; needed where it named one."


class VoteRequest(BaseModel):
    """A choice between the two replies of a comparison."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"choice": "first", "comment": "Warmer."}]})

    choice: Choice = Field(description="The better reply, by position shown.")
    comment: Comment | None = Field(None, description="Why, in the user's words.")
    tags: Tags = Field(default_factory=list, description="Why, in a client's own labels.")
    user: Name | None = Field(None, description=VOTING_USER)


class VoteAnswer(BaseModel):
    """A stored vote, and what was hidden until now: which policies it was between."""

    comparison_id: str = Field(description="The comparison.")
    choice: Choice = Field(description="The better reply, by position shown.")
    comment: str | None = Field(description="Why, in the user's words.")
    tags: list[str] = Field(description="Why, in a client's own labels.")
    policies: list[str | None] = Field(description="The policies, in the order shown.")
    created_at: datetime = Field(description="When the vote was first given.")
    updated_at: datetime = Field(description="When it last changed.")
    final_at: datetime = Field(description="Until when it can be changed or taken back.")


class EventView(BaseModel):
    """One step in the history of a vote or a ranking."""

    model_config = ConfigDict(from_attributes=True)

    kind: Literal["vote", "ranking"] = Field(description="`vote` or `ranking`.")
    action: Literal["given", "revised", "undone"] = Field(description="`given`, `revised` or `undone`.")
    content: dict[str, Any] = Field(
        description="The vote or ranking from then on; where undone, as it was until then."
    )
    created_at: datetime = Field(description="When.")


class History(BaseModel):
    """Everything that a user has said of a comparison."""

    data: list[EventView] = Field(description="The oldest first.")


class ComparisonRequest(BaseModel):
    """Several replies to one prompt, to be ranked."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "What colour is a lemon?"}], "count": 4}]
        }
    )

    messages: Messages = Field(description="The conversation; the user's message is last.")
    count: Annotated[int, Field(ge=2, le=MOST_REPLIES), NUMBER] = Field(
        4, description="How many replies to sample."
    )
    max_tokens: AtLeastOne | None = Field(None, description="Longest reply, in tokens.")
    temperature: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False), NUMBER] | None = Field(
        None, description="Sampling temperature."
    )
    user: Name | None = Field(None, description="Who labels; the ranking must name the same user.")


class ComparedReply(BaseModel):
    """One reply of a comparison, without its policy: labelers are blind too."""

    position: int = Field(description="Position shown at, from 0.")
    reply_id: str = Field(description="The stored reply.")
    content: str = Field(description="What it says.")
    finish_reason: str | None = Field(description="`stop` or `length`.")


class ComparisonView(BaseModel):
    """A comparison to be ranked or voted on."""

    id: str = Field(description="Rank it with PUT /v1/comparisons/{id}/ranking.")
    replies: list[ComparedReply] = Field(description="In random order.")
    votable: bool = Field(description="Whether the replies are worth ranking.")
    why_not: str | None = Field(description="Where they are not: why.")


class RankingRequest(BaseModel):
    """An ordering of a comparison's replies."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"ranks": [2, 1, 2, 4]}]})

    ranks: list[Annotated[int, Field(ge=1, le=MOST_REPLIES), NUMBER]] = Field(
        min_length=2,
        max_length=MOST_REPLIES,
        description="Element i is the rank of the reply at position i. 1 is best; equal ranks are ties.",
    )
    comment: Comment | None = Field(None, description="Why, in the labeler's words.")
    tags: Tags = Field(default_factory=list, description="Why, in a client's own labels.")
    user: Name | None = Field(None, description="The `user` of the comparison; needed where it named one.")


class RankingAnswer(BaseModel):
    """A stored ranking, and the policies that were hidden until now."""

    comparison_id: str = Field(description="The comparison.")
    ranks: list[int] = Field(
        description="Rank by position, as stored: 1 for the best, and so on without gaps."
    )
    comment: str | None = Field(description="Why, in the labeler's words.")
    tags: list[str] = Field(description="Why, in a client's own labels.")
    policies: list[str | None] = Field(description="The policies, in the order shown.")
    created_at: datetime = Field(description="When the ranking was first given.")
    updated_at: datetime = Field(description="When it last changed.")
    final_at: datetime = Field(description="Until when it can be changed or taken back.")


class QueueItem(BaseModel):
    """A prompt worth labelling."""

    comparison_id: str = Field(description="The comparison that was voted on.")
    choice: Literal["neither", "tie"] = Field(description="What the vote said.")
    messages: list[dict[str, Any]] = Field(description="The conversation; the user's message is last.")
    voted_at: datetime = Field(description="When.")


class LabelingQueue(BaseModel):
    """What is worth labelling next."""

    data: list[QueueItem] = Field(description="The most worthwhile first.")


class DemonstrationRequest(BaseModel):
    """A reply that a person wrote: to messages, or in place of a reply of ours."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "What colour is a lemon?"}],
                    "content": "A lemon is yellow.",
                }
            ]
        }
    )

    messages: Messages | None = Field(
        None,
        description="What it answers; the user's message is last. Left out where it corrects.",
    )
    corrects: Name | None = Field(
        None, description="The id of a reply shown to this user, which it replaces."
    )
    content: Annotated[Text, Field(min_length=1, max_length=100_000)] = Field(
        description="The reply; more than white space.", json_schema_extra={"pattern": SAYS_SOMETHING}
    )
    comment: Comment | None = Field(None, description="Why, in the labeler's words.")
    tags: Tags = Field(default_factory=list, description="Labels of the client's own.")
    user: Name | None = Field(
        None, description="Who writes; needed to correct where the chat request named one."
    )

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: str) -> str:
        if not re.search(SAYS_SOMETHING, content):
            raise ValueError("must say something")
        return content


class DemonstrationView(BaseModel):
    """A stored demonstration."""

    id: str = Field(description="Its id.")
    messages: list[dict[str, Any]] = Field(description="What it answers.")
    content: str = Field(description="The reply.")
    corrects: str | None = Field(description="The reply that it replaces.")
    corrected: str | None = Field(description="What that reply said.")
    comment: str | None = Field(description="Why.")
    tags: list[str] = Field(description="Labels.")
    created_at: datetime = Field(description="When it was written.")


class DemonstrationList(BaseModel):
    """A user's demonstrations."""

    data: list[DemonstrationView] = Field(description="The newest first.")
    has_more: bool = Field(description="Whether there are older ones: ask again with `before`.")


class ConversationRequest(BaseModel):
    """Whose conversation it is to be."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user": "ada"}]})

    user: Name | None = Field(None, description="The `user` that its chat requests will name.")


class ConversationView(BaseModel):
    """A conversation in a list."""

    id: str = Field(description="Its id: the field `conversation` of a chat request.")
    title: str | None = Field(description="How it began.")
    turns: int = Field(description="Number of turns.")
    created_at: datetime = Field(description="When it began.")


class ConversationList(BaseModel):
    """A user's conversations."""

    data: list[ConversationView] = Field(description="The newest first.")
    has_more: bool = Field(description="Whether there are older ones: ask again with `before`.")


class ReplyView(BaseModel):
    """A reply in a conversation."""

    id: str = Field(description="Its id.")
    content: str = Field(description="What it says, as far as it came.")
    finish_reason: str | None = Field(description="`stop`, `length`, `error` or `abort`; null while it runs.")
    policy: str | None = Field(description="Who wrote it; null while a vote on it is open.")


class TurnView(BaseModel):
    """A turn of a conversation."""

    current: bool = Field(
        description="Whether the conversation goes on from it: false for one that failed, or that another took the place of."
    )
    message: str = Field(description="What the user said.")
    comparison_id: str | None = Field(description="Where two replies were shown: their comparison.")
    choice: Choice | None = Field(description="The vote on it, if any.")
    replies: list[ReplyView] = Field(description="In the order shown.")
    created_at: datetime = Field(description="When the user said it.")


class ConversationDetail(BaseModel):
    """A conversation."""

    id: str = Field(description="Its id.")
    created_at: datetime = Field(description="When it began.")
    turns: list[TurnView] = Field(description="The oldest first.")


class MarkdownRequest(BaseModel):
    """Texts to show."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"texts": ["A lemon is **yellow**."]}]})

    texts: list[Annotated[Text, Field(max_length=MOST_MARKDOWN)]] = Field(
        min_length=1,
        max_length=MOST_REPLIES,
        description=f"In Markdown; at most {MOST_MARKDOWN} characters in all.",
    )

    @field_validator("texts")
    @classmethod
    def _short_enough(cls, texts: list[str]) -> list[str]:
        if sum(map(len, texts)) > MOST_MARKDOWN:
            raise ValueError(
                f"must be at most {MOST_MARKDOWN} characters in all; show longer ones as they are"
            )
        return texts


class MarkdownAnswer(BaseModel):
    """The texts as HTML."""

    html: list[str] = Field(description="For each text, HTML without scripts, styles and images.")


class UserSettings(BaseModel):
    """What a user decides."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"compares": False}]})

    compares: Flag = Field(
        description="False: show no comparisons that the client did not ask for by `always`, "
        "and from the next cycle on train on what is voted on alone."
    )


class UserView(BaseModel):
    """Who the service takes the caller for."""

    account: str = Field(description="Whose key it is; empty without one.")
    user: str = Field(description="The user within the account.")
    role: Role = Field(description="What the caller may do.")
    compares: bool = Field(
        description="Whether `comparison: auto` may show two replies, and prompts without a vote be trained on."
    )


class Removed(BaseModel):
    """What was removed of a user."""

    prompts: int = Field(description="Prompts, each with its replies.")
    votes: int = Field(description="Votes.")
    policies: list[str] = Field(
        description="The policies that were trained on any of it. Later snapshots hold none of it."
    )
