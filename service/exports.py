"""`/operator/export/{kind}`: everything that people said of replies, as JSONL or Parquet, streamed.

One file is one instant of the database: a single repeatable-read transaction, read through a server-side cursor, in batches.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse
from msgspec import Raw
from sqlalchemy import ARRAY, Select, Text, any_, cast, func, literal, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import aliased

from service.auth import OPERATOR_ONLY
from service.context import ContextDep
from service.errors import BadRequest
from service.formats import (
    FileFormat,
    Kind,
    Row,
    battles_of_vote,
    line,
    pairs_of_ranking,
    pairs_of_vote,
)
from service.tables import (
    Comparison,
    ComparisonReply,
    Conversation,
    Demonstration,
    Prompt,
    Ranking,
    Reply,
    User,
    Vote,
)

router = APIRouter(prefix="/operator/export", tags=["operator"], dependencies=[OPERATOR_ONLY])

BATCH_ROWS = 100
"""Made on the event loop: 3 ms of its time, which chats wait for."""
MEDIA_TYPES: dict[FileFormat, str] = {
    "jsonl": "application/jsonl",
    "parquet": "application/vnd.apache.parquet",
}
FILES: dict[str, dict[str, Any]] = {
    "application/jsonl": {"schema": {"description": "A JSON object on each line."}},
    "application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}},
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file. An error halfway breaks the connection off, so that half a file is not taken for one.",
        "content": FILES,
    }
}
KIND = (
    "`votes`, `rankings`, `demonstrations`: complete, in a format of Ratchet's own. `pairs`: preferences in TRL's "
    "conversational format with explicit prompt. `battles`: votes in FastChat's format."
)
Records = AsyncIterator[list[Row]]


@router.get("/{kind}", response_class=StreamingResponse, responses=ANSWERS)
async def export(
    kind: Annotated[Kind, Path(description=KIND)],
    context: ContextDep,
    format: Annotated[FileFormat, Query(description="The kind of file.")] = "jsonl",
    rankings: Annotated[
        bool, Query(description="`pairs` only: add a pair for every two replies that a ranking tells apart.")
    ] = False,
) -> StreamingResponse:
    """Every vote, ranking or demonstration, in the order of their ids, as a file."""
    if rankings and kind != "pairs":
        raise BadRequest("`rankings` goes with `pairs` only.", param="rankings", code="only_for_pairs")
    chunks = _chunks(context.sessions, kind, format, rankings)
    first = await anext(chunks, b"")  # what fails up to here is still answered as an error
    return StreamingResponse(
        _from(first, chunks),
        media_type=MEDIA_TYPES[format],
        headers={"content-disposition": f'attachment; filename="ratchet-{kind}.{format}"'},
    )


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


class Encoder(Protocol):
    """Makes a file of rows. What it returns, joined, is the file."""

    def add(self, rows: list[Row]) -> bytes: ...

    def close(self) -> bytes: ...


class JsonLines:
    """One object a line."""

    def add(self, rows: list[Row]) -> bytes:
        return b"".join(map(line, rows))

    def close(self) -> bytes:
        return b""


def _encoder(kind: Kind, format: FileFormat) -> Encoder:
    if format == "jsonl":
        return JsonLines()
    from service.parquet import Writer  # here, as pyarrow is slow to import

    return Writer(kind)


async def _chunks(
    sessions: async_sessionmaker[AsyncSession], kind: Kind, format: FileFormat, rankings: bool
) -> AsyncIterator[bytes]:
    """The file, piece by piece. Encoding runs in a thread: chats go on meanwhile."""
    encoder = await asyncio.to_thread(_encoder, kind, format)
    async with sessions() as session:
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        await session.execute(text("SET LOCAL TIME ZONE 'UTC'"))
        for records, rows_of in _parts(session, kind, rankings):
            async for batch in records:
                rows = [row for record in batch for row in rows_of(record)]
                if chunk := await asyncio.to_thread(encoder.add, rows):
                    yield chunk
    yield await asyncio.to_thread(encoder.close)


def _parts(
    session: AsyncSession, kind: Kind, rankings: bool
) -> list[tuple[Records, Callable[[Row], list[Row]]]]:
    """The records that a file is made of, one kind after the other, and what makes rows of them."""
    if kind == "demonstrations":
        return [(_demonstrations(session), _itself)]
    if kind == "rankings":
        return [(_feedback(session, Ranking), _itself)]
    if kind == "votes":
        return [(_feedback(session, Vote), _itself)]
    if kind == "battles":
        return [(_feedback(session, Vote), battles_of_vote)]
    parts: list[tuple[Records, Callable[[Row], list[Row]]]] = [(_feedback(session, Vote), pairs_of_vote)]
    return parts + ([(_feedback(session, Ranking), pairs_of_ranking)] if rankings else [])


def _itself(record: Row) -> list[Row]:
    return [record]


Asker, Shown, Speaker = aliased(User), aliased(User), aliased(User)
Shape = dict[str, Any]
"""A record with columns for values."""


def _user(table: type[User]) -> Shape:
    return {"account": table.account, "name": table.name}


CONVERSATION: Shape = {"id": Conversation.id, "created_at": Conversation.created_at}
PROMPT: Shape = {
    "id": Prompt.id,
    "user": _user(Asker),
    "conversation": CONVERSATION,
    "messages": Prompt.messages,
    "created_at": Prompt.created_at,
}
REPLY: Shape = {
    "id": Reply.id,
    "policy": func.coalesce(Reply.policy, Reply.imported_policy),
    "sampling": cast(Reply.sampling, Text),
    "content": Reply.content,
    "finish_reason": Reply.finish_reason,
    "prompt_tokens": Reply.prompt_tokens,
    "completion_tokens": Reply.completion_tokens,
    "created_at": Reply.created_at,
    "ended_at": Reply.ended_at,
}
COMPARISON: Shape = {
    "id": Comparison.id,
    "user": _user(Shown),
    "reason": Comparison.reason,
    "propensity": Comparison.propensity,
    "created_at": Comparison.created_at,
    "prompt": PROMPT,
}
VOTE: Shape = {
    "id": Vote.id,
    "user": _user(Speaker),
    "choice": Vote.choice,
    "comment": Vote.comment,
    "tags": Vote.tags,
    "created_at": Vote.created_at,
    "updated_at": Vote.updated_at,
    "comparison": COMPARISON,
}
RANKING: Shape = {
    "id": Ranking.id,
    "user": _user(Speaker),
    "ranks": Ranking.ranks,
    "comment": Ranking.comment,
    "tags": Ranking.tags,
    "created_at": Ranking.created_at,
    "updated_at": Ranking.updated_at,
    "comparison": COMPARISON,
}
DEMONSTRATION: Shape = {
    "id": Demonstration.id,
    "user": _user(Speaker),
    "content": Demonstration.content,
    "corrected": Demonstration.corrected,
    "corrects": REPLY,
    "comment": Demonstration.comment,
    "tags": Demonstration.tags,
    "created_at": Demonstration.created_at,
    "prompt": PROMPT,
}


def _columns(shape: Shape) -> Iterator[Any]:
    for value in shape.values():
        if isinstance(value, dict):
            yield from _columns(value)
        else:
            yield value


def _filled(shape: Shape, values: Iterator[Any]) -> Row:
    """The record of a row whose columns are those of the shape, in its order."""
    return {
        name: _filled(value, values) if isinstance(value, dict) else next(values)
        for name, value in shape.items()
    }


async def _feedback(session: AsyncSession, table: type[Vote] | type[Ranking]) -> Records:
    """Votes or rankings as records, by id."""
    shape = VOTE if table is Vote else RANKING
    query = (
        select(*_columns(shape))
        .select_from(table)
        .join(Speaker, Speaker.id == table.user_id)
        .join(Comparison, Comparison.id == table.comparison_id)
        .join(Shown, Shown.id == Comparison.user_id)
        .join(Prompt, Prompt.id == Comparison.prompt_id)
        .join(Asker, Asker.id == Prompt.user_id)
        .outerjoin(Conversation, Conversation.id == Prompt.conversation_id)
        .order_by(table.id)
    )
    async for records in _records(session, query, shape):
        replies = await _replies(session, [record["comparison"]["id"] for record in records])
        for record in records:
            comparison = record["comparison"]
            comparison["replies"] = replies[comparison["id"]]
            _leave_out_absent(comparison["prompt"], "conversation")
        yield records


async def _demonstrations(session: AsyncSession) -> Records:
    """Demonstrations as records, by id: in byte order, which is the same whatever the database's language."""
    query = (
        select(*_columns(DEMONSTRATION))
        .select_from(Demonstration)
        .join(Speaker, Speaker.id == Demonstration.user_id)
        .join(Prompt, Prompt.id == Demonstration.prompt_id)
        .join(Asker, Asker.id == Prompt.user_id)
        .outerjoin(Conversation, Conversation.id == Prompt.conversation_id)
        .outerjoin(Reply, Reply.id == Demonstration.corrects)
        .order_by(Demonstration.id.collate("C"))
    )
    async for records in _records(session, query, DEMONSTRATION):
        for record in records:
            _leave_out_absent(record, "corrects")
            if record["corrects"] is not None:
                record["corrects"] = _with_sampling_as_it_is(record["corrects"])
            _leave_out_absent(record["prompt"], "conversation")
        yield records


def _leave_out_absent(record: Row, name: str) -> None:
    """What an outer join did not find is null, not an object of nulls."""
    if record[name]["id"] is None:
        record[name] = None


async def _records(session: AsyncSession, query: Select[Any], shape: Shape) -> Records:
    """A query's rows from a server-side cursor, as records."""
    result = await session.stream(query, execution_options={"yield_per": BATCH_ROWS})
    async for batch in result.partitions():
        yield [_filled(shape, iter(row)) for row in batch]


async def _replies(session: AsyncSession, comparisons: list[str]) -> dict[str, list[Row]]:
    """Of each comparison its replies, in the order shown."""
    query = (
        select(ComparisonReply.comparison_id, *_columns(REPLY))
        .join(Reply, Reply.id == ComparisonReply.reply_id)
        .where(ComparisonReply.comparison_id == any_(literal(comparisons, ARRAY(Text))))
        .order_by(ComparisonReply.comparison_id, ComparisonReply.position)
    )
    replies: dict[str, list[Row]] = {comparison_id: [] for comparison_id in comparisons}
    for comparison_id, *values in await session.execute(query):
        replies[comparison_id].append(_with_sampling_as_it_is(_filled(REPLY, iter(values))))
    return replies


def _with_sampling_as_it_is(reply: Row) -> Row:
    """As the database writes it: numbers that Python would round or write another way come back the same."""
    return reply | {"sampling": Raw(reply["sampling"].encode())}
