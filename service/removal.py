"""Removes what people wrote: a conversation, or all of a user. Rows are deleted, so no later snapshot can hold them.

That a snapshot once held a vote, a ranking, a demonstration or a prompt stays on record by its id alone, which is how a policy that
learnt from it can still be named; its content is taken out of the snapshot's file by the trainer. Each function works within
the caller's transaction.
"""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Text, cast, delete, func, literal, select, union
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
    RemovedFeedback,
    Reply,
    SnapshotFeedback,
    User,
    Vote,
)

SNAPSHOT_LOCK = 7_221_006
"""Number of the advisory lock that orders removals and the taking of a snapshot: one sees all of the other, or nothing."""
Held = type[Vote | Ranking | Demonstration | Prompt]
KINDS: dict[Held, str] = {
    Vote: "vote",
    Ranking: "ranking",
    Demonstration: "demonstration",
    Prompt: "prompt",
}
"""What a snapshot is made of, by its kind there."""


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
    """The policies that were trained on what this user gave, in order."""
    # One query a kind, and not one with OR: for that PostgreSQL reads all feedback of all snapshots.
    theirs = [
        select(Cycle.policy)
        .join(SnapshotFeedback, SnapshotFeedback.sha256 == Cycle.snapshot_sha256)
        .join(given, cast(given.id, Text) == SnapshotFeedback.feedback_id)
        .where(SnapshotFeedback.kind == kind, given.user_id == user_id, Cycle.policy.is_not(None))
        for given, kind in KINDS.items()
    ]
    return sorted(policy for policy in await session.scalars(union(*theirs)) if policy is not None)


async def remove_user(session: AsyncSession, user_id: int) -> Counts:
    """Delete a user's prompts, replies, votes, rankings, demonstrations and conversations, and the user."""
    num_votes = await session.scalar(select(func.count()).where(Vote.user_id == user_id)) or 0
    for given in KINDS:
        await note(session, given, given.user_id == user_id)
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
    await note(session, Vote, Vote.comparison_id.in_(comparisons))
    await note(session, Ranking, Ranking.comparison_id.in_(comparisons))
    await note(session, Demonstration, Demonstration.prompt_id.in_(prompts))
    await note(session, Prompt, which)
    for table in (Vote, Ranking, FeedbackEvent, ComparisonReply):
        await session.execute(delete(table).where(table.comparison_id.in_(comparisons)))
    for hanging in (Comparison, Demonstration, Reply):
        await session.execute(delete(hanging).where(hanging.prompt_id.in_(prompts)))
    deleted = await session.scalars(delete(Prompt).where(which).returning(Prompt.id))
    return len(deleted.all())


async def note(session: AsyncSession, table: Held, which: ColumnElement[bool]) -> None:
    """Have the trainer take rows that a snapshot holds out of its file; to be called before they are deleted."""
    kind = KINDS[table]
    await session.execute(select(func.pg_advisory_xact_lock_shared(SNAPSHOT_LOCK)))
    feedback_id = cast(table.id, Text)
    held = select(literal(kind), feedback_id).where(
        which,
        select(SnapshotFeedback)
        .where(SnapshotFeedback.kind == kind, SnapshotFeedback.feedback_id == feedback_id)
        .exists(),
    )
    columns = [RemovedFeedback.kind, RemovedFeedback.feedback_id]
    await session.execute(insert(RemovedFeedback).from_select(columns, held).on_conflict_do_nothing())
