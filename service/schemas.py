"""What chat requests and responses look like: OpenAI's shapes, plus what comparing needs. Validation only."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    Strict,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.engine import Message
from service.errors import BadRequest
from service.pairing import Mode

ALIAS = "ratchet"
MOST_SEED = (1 << 53) - 1
"""Past it, programs that read JSON numbers as doubles (JavaScript, jq) would change it unseen."""
MOST_MESSAGES = 2048


class _Storable:
    """PostgreSQL holds neither NUL nor half a character. The schema can name the former; JSON knows no half ones."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(schema) | {"pattern": "^[^\\u0000]*$"}


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold NUL characters (\\u0000); remove them")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not hold lone surrogates (\\ud800 to \\udfff); remove them") from None
    return text


def _joined_text(content: object) -> object:
    """OpenAI's list of text parts as one text; anything else that is no text is refused."""
    if isinstance(content, str):
        return content
    wrong = "must be text, or a list of parts of type `text`; images, audio and files are not taken"
    if not isinstance(content, list):
        raise ValueError(wrong)
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        raise ValueError(wrong)
    return "".join(str(text) for text in texts)


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _number(value: object) -> object:
    """Pydantic takes texts and booleans for numbers; OpenAI does not."""
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


def _only_one(n: int) -> int:
    if n != 1:
        raise ValueError("must be 1; for two answers to vote on, set `comparison` to `always`")
    return n


Text = Annotated[str, AfterValidator(_storable), _Storable()]
NUMBER = BeforeValidator(_number)
# Bounds stand inside it: around a validator they would not get into the document.
AtLeastOne = Annotated[int, Field(ge=1), NUMBER]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), NUMBER]
UpToTwo = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False), NUMBER]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False), NUMBER]
Seed = Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED), NUMBER]
Flag = Annotated[bool, Strict()]
Name = Annotated[Text, Field(min_length=1, max_length=200)]
Stop = Annotated[Text, Field(min_length=1)]
Stops = Annotated[list[Stop], Field(max_length=4)]
Limit = Annotated[int, Query(ge=1, le=100, description="At most so many.")]
Before = Annotated[
    Text | None,
    Query(max_length=200, description="Only those older than this one: the last of the page before."),
]
Id = Annotated[Text, Path(max_length=200, description="Its id.")]


class TextPart(BaseModel):
    """One part of a message's content."""

    type: Literal["text"] = Field(description="Only text is taken.")
    text: Text = Field(description="The text.")


class ChatMessage(BaseModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: Annotated[Text, BeforeValidator(_joined_text, json_schema_input_type=Text | list[TextPart])] = (
        Field(description="What is said: text, or text parts, which are joined.")
    )


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]


def read_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """As the engine takes them. Raises BadRequest where the last one is not the user's."""
    if messages[-1].role != "user":
        raise BadRequest(
            "The last message must be the user's.", param="messages", code="last_message_not_user"
        )
    # Many chat templates know no role `developer`, OpenAI's newer name of `system`.
    return [Message("system" if m.role == "developer" else m.role, m.content) for m in messages]


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: Flag = Field(False, description="Send a last chunk with `usage` and no choices.")


class ErrorBody(BaseModel):
    """What went wrong, and what to change."""

    message: str = Field(description="For people.")
    type: str = Field(description="The kind of error.", examples=["invalid_request_error"])
    param: str | None = Field(description="The field at fault.")
    code: str | None = Field(description="For programs.")


class ErrorAnswer(BaseModel):
    """Every error has OpenAI's shape."""

    error: ErrorBody = Field(description="The error.")


class ChatRequest(BaseModel):
    """OpenAI's request. Fields not named here are ignored, and listed in header `x-ratchet-ignored`."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "model": ALIAS,
                    "messages": [{"role": "user", "content": "What colour is a lemon?"}],
                    "comparison": "always",
                }
            ]
        },
    )

    model: Text = Field(
        ALIAS, description="`ratchet`, the policy that is live; or a policy's name from /v1/models."
    )
    messages: Messages = Field(description="The conversation; the user's message is last.")
    comparison: Mode = Field(
        "never", description="`always`: two replies to vote on. `auto`: sometimes two. `never`: one."
    )
    max_tokens: AtLeastOne | None = Field(None, description="Longest reply, in tokens.")
    max_completion_tokens: AtLeastOne | None = Field(None, description="OpenAI's newer name of `max_tokens`.")
    temperature: UpToTwo | None = Field(None, description="0 takes the likeliest token.")
    top_p: Share | None = Field(
        None,
        description="Nucleus sampling. Without it, the service's default filter (`RATCHET_DEFAULT_MIN_P`).",
    )
    stop: Annotated[Stops, BeforeValidator(_listed, json_schema_input_type=Stop | Stops)] | None = Field(
        None, description="A text that ends the reply, or up to four of them."
    )
    seed: Seed | None = Field(None, description="Makes sampling repeatable.")
    presence_penalty: Penalty | None = Field(None, description="Against tokens that already occurred.")
    frequency_penalty: Penalty | None = Field(None, description="Against tokens by how often they occurred.")
    stream: Flag | None = Field(
        None, description="Send the reply as server-sent events while it is generated."
    )
    stream_options: StreamOptions | None = Field(None, description="How to stream.")
    logprobs: Flag | None = Field(None, description="Report the log-probability of each token.")
    top_logprobs: Annotated[int, Field(ge=0, le=20), NUMBER] | None = Field(
        None, description="Likeliest alternatives to report per token; needs `logprobs`."
    )
    user: Name | None = Field(None, description="Who asks; a vote on the comparison must name the same user.")
    conversation: Name | None = Field(
        None,
        description="A conversation from POST /v1/conversations that this turn goes on with: `messages` then holds only "
        "what is new, and the service puts the turns so far before it, each with the reply that was chosen.",
    )
    follows: Annotated[Text, Field(max_length=200)] | None = Field(
        None,
        description="With `conversation`: the reply (its id) that this turn follows, in place of the newest turn's chosen one; "
        "empty: none, it begins anew. So that an earlier turn can be edited or tried again.",
    )
    n: Annotated[int, NUMBER, AfterValidator(_only_one), WithJsonSchema({"const": 1})] | None = Field(
        None, description="Only 1."
    )


class ComparisonTag(BaseModel):
    """Marks an answer of two replies."""

    id: str = Field(description="Vote on it with PUT /v1/comparisons/{id}/vote.", examples=["cmp-5f0c..."])
    votable: bool | None = Field(
        None, description="Once both replies have ended: whether they are worth a vote."
    )
    why_not: str | None = Field(
        None,
        description="Where they are not: `comparison_failed`, `comparison_cut_off`, or `replies_alike`.",
    )


class Usage(BaseModel):
    """Tokens of a request. The prompt counts once, also in a comparison."""

    prompt_tokens: int = Field(description="Tokens of the prompt.")
    completion_tokens: int = Field(description="Tokens of all replies.")
    total_tokens: int = Field(description="Both.")


class ReplyMessage(BaseModel):
    """What the policy says."""

    role: Literal["assistant"] = Field("assistant", description="Always the assistant.")
    content: str = Field(description="The reply.")
    refusal: None = Field(None, description="OpenAI's field; always null.")


class Choice(BaseModel):
    """One reply. In a comparison, choice 0 is `first`, choice 1 `second`."""

    index: int = Field(description="Position shown at.")
    message: ReplyMessage = Field(description="The reply.")
    finish_reason: str = Field(description="`stop` or `length`.")
    logprobs: dict[str, Any] | None = Field(None, description="OpenAI's `logprobs`, where asked for.")
    reply_id: str = Field(description="The stored reply.", examples=["chatcmpl-77ab..."])


class Completion(BaseModel):
    """OpenAI's `chat.completion`."""

    id: str = Field(description="The reply's id; in a comparison, the comparison's.")
    object: Literal["chat.completion"] = Field("chat.completion", description="OpenAI's type.")
    created: int = Field(description="Unix time in seconds.")
    model: str = Field(description="The policy that answered; in a comparison only `ratchet`.")
    choices: list[Choice] = Field(description="One reply, or two in a comparison.")
    usage: Usage = Field(description="Tokens used.")
    comparison: ComparisonTag | None = Field(None, description="Only in a comparison.")


class Delta(BaseModel):
    """What a chunk adds to a reply."""

    role: Literal["assistant"] | None = Field(None, description="In a reply's first chunk.")
    content: str | None = Field(None, description="Text to append.")


class ChunkChoice(BaseModel):
    """A part of one reply."""

    index: int = Field(description="Position shown at.")
    delta: Delta = Field(description="What is new.")
    logprobs: dict[str, Any] | None = Field(None, description="OpenAI's `logprobs`, where asked for.")
    finish_reason: str | None = Field(description="Null until the reply has ended.")
    reply_id: str | None = Field(None, description="In a reply's first chunk: the stored reply.")


class Chunk(BaseModel):
    """OpenAI's `chat.completion.chunk`."""

    id: str = Field(description="As in `chat.completion`.")
    object: Literal["chat.completion.chunk"] = Field(description="OpenAI's type.")
    created: int = Field(description="Unix time in seconds.")
    model: str = Field(description="As in `chat.completion`.")
    choices: list[ChunkChoice] = Field(description="Empty in the chunk that carries `usage`.")
    usage: Usage | None = Field(None, description="In the last chunk, where asked for; null before.")
    comparison: ComparisonTag | None = Field(
        None, description="In the first chunk of a comparison, and in the one that ends its last reply."
    )


CHUNK_EVENT: dict[str, Any] = {
    "type": "object",
    "description": "A server-sent event.",
    "required": ["data"],
    "properties": {
        "data": {
            "description": "A chunk; the last one is `[DONE]`, or the error that ended the answer.",
            "anyOf": [
                {"const": "[DONE]"},
                {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": {
                        "anyOf": [
                            {"$ref": "#/components/schemas/Chunk"},
                            {"$ref": "#/components/schemas/ErrorAnswer"},
                        ]
                    },
                },
            ],
        }
    },
}


class Health(BaseModel):
    """That the process answers."""

    status: Literal["ok"] = Field("ok", description="Always `ok`.")


class Readiness(BaseModel):
    """That all that a chat needs answers."""

    status: Literal["ready"] = Field(
        "ready", description="Always `ready`; where it is not, the answer is an error."
    )
    live: str = Field(description="The policy that answers.")


class Model(BaseModel):
    """Something that can be asked by name."""

    id: str = Field(description="To be given as `model`.")
    object: Literal["model"] = Field("model", description="OpenAI's type.")
    created: int = Field(description="Unix time in seconds.")
    owned_by: str = Field("ratchet", description="Always `ratchet`.")


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = Field("list", description="OpenAI's type.")
    data: list[Model] = Field(description="The alias first, then the policies that are loaded.")


class Status(BaseModel):
    """How far the loop is, for the page's footer."""

    live: str = Field(description="The policy that answers.")
    votes: int = Field(description="Votes so far.")
    cycles: int = Field(description="Cycles begun so far.")
    cycle_stage: str | None = Field(description="Stage of the cycle that runs now; null where none does.")
