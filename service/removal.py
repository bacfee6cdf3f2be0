"""Removes what people wrote: a conversation, or all of a user. Rows are deleted, so no later snapshot can hold them.

That a snapshot once held a vote stays on record by the vote's number alone, which is how a policy that learnt from it can
still be named; its content is taken out of the snapshot's file by the trainer. Each function works within the caller's transaction.
"""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import NotFound
from service.journal import UserName
from service.tables import (
    Comparison,
    ComparisonReply,
    Conversation,
    Cycle,
    Demonstration,
    FeedbackEvent,
    IdempotentCall,
    Prompt,
    Ranking,
    RemovedVote,
    Reply,
    SnapshotVote,
    User,
    Vote,
)


@dataclass(frozen=True, slots=True)
class Counts:
    """How much was removed."""

    prompts: int
    votes: int


async def lock_user(session: AsyncSession, user: UserName) -> int:
    """The user's id; nothing of theirs is added until the transaction ends. Raises NotFound."""
    query = select(User.id).where(User.account == user.account, User.name == user.name).with_for_update()
    user_id = await session.scalar(query)
    if user_id is None:
        raise NotFound("Nothing is stored of this user.", param="user", code="user_not_found")
    return user_id


async def trained_on(session: AsyncSession, user_id: int) -> list[str]:
    """The policies that were trained on this user's votes, in order."""
    query = (
        select(Cycle.policy)
        .distinct()
        .join(SnapshotVote, SnapshotVote.sha256 == Cycle.snapshot_sha256)
        .join(Vote, Vote.id == SnapshotVote.vote_id)
        .where(Vote.user_id == user_id, Cycle.policy.is_not(None))
        .order_by(Cycle.policy)
    )
    return [policy for policy in await session.scalars(query) if policy is not None]


async def remove_user(session: AsyncSession, user_id: int) -> Counts:
    """Delete a user's prompts, replies, votes, rankings, demonstrations and conversations, and the user."""
    num_votes = await session.scalar(select(func.count()).where(Vote.user_id == user_id)) or 0
    await _note_votes(session, Vote.user_id == user_id)
    for table in (Vote, Ranking, FeedbackEvent, Demonstration, IdempotentCall):
        await session.execute(delete(table).where(table.user_id == user_id))
    num_prompts = await _remove_prompts(session, Prompt.user_id == user_id)
    await session.execute(delete(Conversation).where(Conversation.user_id == user_id))
    await session.execute(delete(User).where(User.id == user_id))
    return Counts(prompts=num_prompts, votes=num_votes)


async def remove_conversation(session: AsyncSession, conversation_id: str) -> None:
    """Delete a conversation with all its turns and the votes on them."""
    await _remove_prompts(session, Prompt.conversation_id == conversation_id)
    await session.execute(delete(Conversation).where(Conversation.id == conversation_id))


async def _remove_prompts(session: AsyncSession, which: ColumnElement[bool]) -> int:
    """Delete prompts and everything that hangs on them, whoever added it. Returns how many there were."""
    prompts = select(Prompt.id).where(which)
    comparisons = select(Comparison.id).where(Comparison.prompt_id.in_(prompts))
    await _note_votes(session, Vote.comparison_id.in_(comparisons))
    for table in (Vote, Ranking, FeedbackEvent, ComparisonReply):
        await session.execute(delete(table).where(table.comparison_id.in_(comparisons)))
    for hanging in (Comparison, Demonstration, Reply):
        await session.execute(delete(hanging).where(hanging.prompt_id.in_(prompts)))
    deleted = await session.scalars(delete(Prompt).where(which).returning(Prompt.id))
    return len(deleted.all())


async def _note_votes(session: AsyncSession, which: ColumnElement[bool]) -> None:
    """Have the trainer take votes that a snapshot holds out of its file."""
    held = select(Vote.id).where(which, select(SnapshotVote).where(SnapshotVote.vote_id == Vote.id).exists())
    await session.execute(
        insert(RemovedVote).from_select([RemovedVote.vote_id], held).on_conflict_do_nothing()
    )
