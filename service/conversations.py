"""Conversations: begun, listed, read and deleted by their owner; and what a next turn's context is.

A conversation's context is its last answered prompt and the reply that was chosen: by the vote on its comparison, else the
one that was shown first. A turn may follow an earlier reply instead (it was edited, or tried again): then the turns after that
one stay on record, and the conversation goes on without them.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service import removal
from service.auth import IdentityDep
from service.context import ContextDep
from service.engine import Message
from service.errors import NotFound
from service.feedback_schemas import (
    ConversationDetail,
    ConversationList,
    ConversationRequest,
    ConversationView,
    ReplyView,
    TurnView,
)
from service.journal import UserName
from service.schemas import Before, Id, Limit
from service.tables import Comparison, ComparisonReply, Conversation, Prompt, Reply, User, Vote
from service.users import UserQuery, make_user

router = APIRouter(tags=["conversations"])
PATH = "/v1/conversations"
TITLE_CHARACTERS = 80
KEPT = ("stop", "length", "abort")
"""Finish reasons of replies that a conversation goes on from."""


@router.post(PATH, status_code=201)
async def begin_conversation(
    identity: IdentityDep, context: ContextDep, body: ConversationRequest | None = None
) -> ConversationView:
    """Begin a conversation; chat requests name it in their field `conversation`."""
    user = identity.user(body.user if body else None)
    async with context.sessions.begin() as session:
        row = Conversation(id=f"conv-{secrets.token_hex(16)}", user_id=await make_user(session, user))
        session.add(row)
        await session.flush()
        await session.refresh(row)
    return ConversationView(id=row.id, title=None, turns=0, created_at=row.created_at)


@router.get(PATH)
async def list_conversations(
    identity: IdentityDep,
    context: ContextDep,
    user: UserQuery = None,
    limit: Limit = 20,
    before: Before = None,
) -> ConversationList:
    """Your conversations that have a turn, the newest first."""
    who = identity.user(user)
    owner = select(User.id).where(User.account == who.account, User.name == who.name).scalar_subquery()
    of_this = Prompt.conversation_id == Conversation.id
    said_first = select(Prompt.messages[-1]["content"].astext).where(of_this).order_by(Prompt.id).limit(1)
    turns = select(func.count(Prompt.id)).where(of_this)
    query = (
        select(
            Conversation,
            said_first.correlate(Conversation).scalar_subquery(),
            turns.correlate(Conversation).scalar_subquery(),
        )
        .where(Conversation.user_id == owner, select(Prompt.id).where(of_this).exists())
        .order_by(Conversation.created_at.desc(), Conversation.id.desc())
        .limit(limit + 1)
    )
    async with context.sessions() as session:
        if before is not None:
            last = await _owned(session, before, who)
            query = query.where(
                func.row(Conversation.created_at, Conversation.id) < func.row(last.created_at, last.id)
            )
        rows = (await session.execute(query)).all()
    views = [
        ConversationView(
            id=row.id, title=(title or "")[:TITLE_CHARACTERS], turns=num_turns, created_at=row.created_at
        )
        for row, title, num_turns in rows[:limit]
    ]
    return ConversationList(data=views, has_more=len(rows) > limit)


@router.get(PATH + "/{conversation_id}")
async def read_conversation(
    conversation_id: Id, identity: IdentityDep, context: ContextDep, user: UserQuery = None
) -> ConversationDetail:
    """A conversation with all its turns. Policies stay hidden where a comparison has no vote yet."""
    async with context.sessions() as session:
        conversation = await _owned(session, conversation_id, identity.user(user))
        query = _turns(conversation_id).order_by(Prompt.id, ComparisonReply.position)
        rows = (await session.execute(query)).all()
        current = _path([(row.Prompt, row.Reply) for row in rows])
        turns: dict[int, TurnView] = {}
        for prompt, reply, _, comparison_id, choice in rows:
            turn = turns.setdefault(
                prompt.id,
                TurnView(
                    current=prompt.id in current,
                    message=prompt.messages[-1]["content"],
                    comparison_id=comparison_id,
                    choice=choice,
                    replies=[],
                    created_at=prompt.created_at,
                ),
            )
            hidden = comparison_id is not None and choice is None
            turn.replies.append(
                ReplyView(
                    id=reply.id,
                    content=reply.content or "",
                    finish_reason=reply.finish_reason,
                    policy=None if hidden else reply.policy,
                )
            )
    return ConversationDetail(
        id=conversation.id, created_at=conversation.created_at, turns=list(turns.values())
    )


@router.delete(PATH + "/{conversation_id}", status_code=204)
async def delete_conversation(
    conversation_id: Id, identity: IdentityDep, context: ContextDep, user: UserQuery = None
) -> Response:
    """Delete a conversation with its turns, and the votes on them."""
    who = identity.user(user)
    async with context.sessions.begin() as session:
        await _owned(session, conversation_id, who)
        await removal.lock_user(session, who)
        await removal.remove_conversation(session, conversation_id)
    return Response(status_code=204)


async def read_context(
    sessions: async_sessionmaker[AsyncSession], conversation_id: str, user: UserName, follows: str | None
) -> list[Message]:
    """The conversation so far, as the next turn begins: up to the reply that it `follows`, else to the newest chosen one.

    Raises NotFound where it is not this user's, or has no such reply.
    """
    async with sessions() as session:
        await _owned(session, conversation_id, user)
        query = _turns(conversation_id).where(Reply.content != "", Reply.finish_reason.in_(KEPT))
        if follows:
            query = query.where(Reply.id == follows)
        query = query.order_by(Prompt.id.desc(), ComparisonReply.position).limit(9)  # of one comparison
        rows = [] if follows == "" else (await session.execute(query)).all()
    if follows and not rows:
        raise NotFound(
            "This conversation has no such reply that ended well. `follows` takes a `reply_id` of one of its answers.",
            param="follows",
            code="reply_not_found",
        )
    if not rows:
        return []
    prompt = rows[0].Prompt
    last = [row for row in rows if row.Prompt.id == prompt.id]
    wanted = 1 if last[0].choice == "second" else 0
    chosen = next((row for row in last if row.position == wanted), last[0]).Reply
    return [*(Message(**message) for message in prompt.messages), Message("assistant", chosen.content)]


def _path(rows: Sequence[tuple[Prompt, Reply]]) -> set[int]:
    """The prompts that the newest answered one goes on from, and itself: its messages tell. rows: in order of prompts."""
    path: set[int] = set()
    wanted: list[Any] | None = None
    for prompt, reply in reversed(rows):
        said = [*prompt.messages, {"role": "assistant", "content": reply.content}]
        kept = bool(reply.content) and reply.finish_reason in KEPT
        if kept and (wanted is None or wanted[: len(said)] == said):
            path.add(prompt.id)
            wanted = prompt.messages
    return path


def _turns(conversation_id: str) -> Select[Prompt, Reply, int | None, str | None, str | None]:
    """Prompt, reply, its position, comparison id, and its owner's choice: a row for each reply."""
    return (
        select(Prompt, Reply, ComparisonReply.position, Comparison.id, Vote.choice)
        .join(Reply, Reply.prompt_id == Prompt.id)
        .outerjoin(ComparisonReply, ComparisonReply.reply_id == Reply.id)
        .outerjoin(Comparison, Comparison.id == ComparisonReply.comparison_id)
        .outerjoin(Vote, (Vote.comparison_id == Comparison.id) & (Vote.user_id == Comparison.user_id))
        .where(Prompt.conversation_id == conversation_id)
    )


async def _owned(session: AsyncSession, conversation_id: str, user: UserName) -> Conversation:
    """Raises NotFound where there is no such conversation of this user."""
    query = (
        select(Conversation)
        .join(User, User.id == Conversation.user_id)
        .where(Conversation.id == conversation_id, User.account == user.account, User.name == user.name)
    )
    conversation = await session.scalar(query)
    if conversation is None:
        raise NotFound(
            "This user has no such conversation. POST /v1/conversations begins one.",
            param="conversation",
            code="conversation_not_found",
        )
    return conversation
