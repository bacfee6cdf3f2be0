"""`/v1/comparisons/{id}/vote`: a user's choice, given, read and taken back. Answered after commit."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from sqlalchemy import case, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from service import metrics
from service.context import ContextDep
from service.engine import FINISHED
from service.errors import Conflict, NotFound
from service.schemas import ANONYMOUS, Name, VoteAnswer, VoteRequest
from service.tables import Comparison, ComparisonReply, Reply, User, Vote

router = APIRouter(tags=["votes"])
PATH = "/v1/comparisons/{comparison_id}/vote"
UserQuery = Annotated[Name, Query(description="The `user` of the chat request; needed where it named one.")]


@router.put(PATH)
async def give_vote(comparison_id: str, body: VoteRequest, context: ContextDep) -> VoteAnswer:
    """Vote, or change the vote. Giving the same vote twice is one vote."""
    async with context.sessions.begin() as session:
        user_id = await _shown_to(session, comparison_id, body.user or ANONYMOUS)
        replies = await _replies(session, comparison_id)
        _check_votable(replies)
        vote = await _store(session, comparison_id, user_id, body)
    metrics.VOTES.labels(body.choice).inc()
    return _answer(vote, replies)


@router.get(PATH)
async def read_vote(comparison_id: str, context: ContextDep, user: UserQuery = ANONYMOUS) -> VoteAnswer:
    """The vote as it is stored."""
    async with context.sessions() as session:
        user_id = await _shown_to(session, comparison_id, user)
        vote = await session.scalar(
            select(Vote).where(Vote.comparison_id == comparison_id, Vote.user_id == user_id)
        )
        if vote is None:
            raise NotFound("There is no vote on this comparison yet.", code="vote_not_found")
        return _answer(vote, await _replies(session, comparison_id))


@router.delete(PATH, status_code=204)
async def take_vote_back(comparison_id: str, context: ContextDep, user: UserQuery = ANONYMOUS) -> Response:
    """Take the vote back; that there is none (any more) is fine."""
    async with context.sessions.begin() as session:
        user_id = await _shown_to(session, comparison_id, user)
        await session.execute(
            delete(Vote).where(Vote.comparison_id == comparison_id, Vote.user_id == user_id)
        )
    return Response(status_code=204)


async def _shown_to(session: AsyncSession, comparison_id: str, user: str) -> int:
    """The user's id. Raises NotFound where the comparison was not shown to this user."""
    query = (
        select(User.id)
        .join(Comparison, Comparison.user_id == User.id)
        .where(Comparison.id == comparison_id.replace("\0", ""), User.name == user)
    )
    user_id = await session.scalar(query)
    if user_id is None:
        raise NotFound(
            "No such comparison was shown to this user. The field `user` must be that of the chat request.",
            param="id",
            code="comparison_not_found",
        )
    return user_id


async def _replies(session: AsyncSession, comparison_id: str) -> list[Reply]:
    """In the order shown."""
    query = (
        select(Reply)
        .join(ComparisonReply, ComparisonReply.reply_id == Reply.id)
        .where(ComparisonReply.comparison_id == comparison_id)
        .order_by(ComparisonReply.position)
    )
    return list(await session.scalars(query))


def _check_votable(replies: list[Reply]) -> None:
    """Raises Conflict where a vote would say nothing: a reply still runs or failed, or both are the same."""
    if any(reply.finish_reason is None for reply in replies):
        raise Conflict("Both replies must have ended before the vote.", code="comparison_running")
    if any(reply.finish_reason not in FINISHED for reply in replies):
        raise Conflict(
            "One of the replies did not end, so they cannot be compared.", code="comparison_failed"
        )
    if len({reply.content for reply in replies}) == 1:
        raise Conflict("The two replies are identical: there is nothing to choose.", code="replies_identical")


async def _store(session: AsyncSession, comparison_id: str, user_id: int, body: VoteRequest) -> Vote:
    """Insert or revise. `updated_at` moves only where something changed."""
    new = {"choice": body.choice, "comment": body.comment, "tags": body.tags}
    changed = or_(
        Vote.choice != body.choice, Vote.comment.is_distinct_from(body.comment), Vote.tags != body.tags
    )
    query = (
        insert(Vote)
        .values(comparison_id=comparison_id, user_id=user_id, **new)
        .on_conflict_do_update(
            index_elements=[Vote.comparison_id, Vote.user_id],
            set_=new | {"updated_at": case((changed, func.now()), else_=Vote.updated_at)},
        )
        .returning(Vote)
    )
    return (await session.scalars(query)).one()


def _answer(vote: Vote, replies: list[Reply]) -> VoteAnswer:
    return VoteAnswer(
        comparison_id=vote.comparison_id,
        choice=vote.choice,
        comment=vote.comment,
        tags=vote.tags,
        policies=[reply.policy for reply in replies],
        created_at=vote.created_at,
        updated_at=vote.updated_at,
    )
