"""`/v1/comparisons/{id}/vote`: a user's choice, given, read and taken back. Answered after commit."""

from fastapi import APIRouter, Response
from sqlalchemy import select

from service import feedback, metrics
from service.auth import IdentityDep
from service.context import Context, ContextDep
from service.errors import Conflict, NotFound
from service.feedback_schemas import EventView, History, VoteAnswer, VoteRequest
from service.idempotency import IdempotencyKey, once
from service.schemas import Id
from service.tables import Reply, Vote
from service.users import UserQuery

router = APIRouter(tags=["votes"])
PATH = "/v1/comparisons/{comparison_id}/vote"
COLUMNS = ("choice", "comment", "tags")


@router.put(PATH)
async def give_vote(
    comparison_id: Id,
    body: VoteRequest,
    identity: IdentityDep,
    context: ContextDep,
    key: IdempotencyKey = None,
) -> VoteAnswer:
    """Vote, or change the vote. Giving the same vote twice is one vote."""
    user = identity.user(body.user)
    async with context.sessions.begin() as session:
        user_id = await feedback.shown_to(session, comparison_id, user)
        call = await once(session, user_id, key, f"PUT {comparison_id}/vote", body)
        if call.answer is not None:
            return VoteAnswer.model_validate(call.answer)
        replies = await feedback.read_replies(session, comparison_id)
        _check_votable(replies)
        content = body.model_dump(include=set(COLUMNS))
        vote, change = await feedback.store(session, Vote, comparison_id, user_id, content, context.settings)
        answer = _answer(vote, replies, context)
        call.remember(answer)
    if change is not None:
        metrics.VOTES.labels(body.choice, change).inc()
    return answer


@router.get(PATH)
async def read_vote(
    comparison_id: Id, identity: IdentityDep, context: ContextDep, user: UserQuery = None
) -> VoteAnswer:
    """The vote as it is stored."""
    async with context.sessions() as session:
        user_id = await feedback.shown_to(session, comparison_id, identity.user(user))
        vote = await session.scalar(
            select(Vote).where(Vote.comparison_id == comparison_id, Vote.user_id == user_id)
        )
        if vote is None:
            raise NotFound("There is no vote on this comparison yet.", code="vote_not_found")
        return _answer(vote, await feedback.read_replies(session, comparison_id), context)


@router.delete(PATH, status_code=204)
async def take_vote_back(
    comparison_id: Id, identity: IdentityDep, context: ContextDep, user: UserQuery = None
) -> Response:
    """Take the vote back; that there is none (any more) is fine."""
    async with context.sessions.begin() as session:
        user_id = await feedback.shown_to(session, comparison_id, identity.user(user))
        await feedback.take_back(session, Vote, comparison_id, user_id, COLUMNS, context.settings)
    return Response(status_code=204)


@router.get(PATH + "/history")
async def read_vote_history(
    comparison_id: Id, identity: IdentityDep, context: ContextDep, user: UserQuery = None
) -> History:
    """Each time that the vote was given, revised or undone."""
    async with context.sessions() as session:
        user_id = await feedback.shown_to(session, comparison_id, identity.user(user))
        events = await feedback.read_history(session, comparison_id, user_id, "vote")
    return History(data=[EventView.model_validate(event) for event in events])


def _check_votable(replies: list[Reply]) -> None:
    """Raises Conflict where a vote would say nothing."""
    if len(replies) != 2:
        raise Conflict(
            "A vote is between two replies; PUT .../ranking orders more.", code="comparison_needs_ranking"
        )
    feedback.check_worth_it(replies)


def _answer(vote: Vote, replies: list[Reply], context: Context) -> VoteAnswer:
    return VoteAnswer(
        comparison_id=vote.comparison_id,
        choice=vote.choice,
        comment=vote.comment,
        tags=vote.tags,
        policies=[reply.policy for reply in replies],
        created_at=vote.created_at,
        updated_at=vote.updated_at,
        final_at=feedback.final_at(vote, context.settings),
    )
