"""Several replies to one prompt, and a labeler's ordering of them: `POST /v1/comparisons`, `/v1/comparisons/{id}/ranking`."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import select

from service import feedback
from service.auth import IdentityDep, LabelerDep
from service.chat import read_sampling
from service.context import Context, ContextDep
from service.errors import BadRequest, NotFound
from service.feedback_schemas import (
    ComparedReply,
    ComparisonRequest,
    ComparisonView,
    EventView,
    History,
    RankingAnswer,
    RankingRequest,
)
from service.generation import Asked, Generation, generating
from service.idempotency import IdempotencyKey, once
from service.keyring import Identity
from service.pairing import Pairing
from service.schemas import ChatRequest, Id, read_messages
from service.streaming import until_gone
from service.tables import Ranking, Reply
from service.users import UserQuery

router = APIRouter(tags=["rankings"])
PATH = "/v1/comparisons/{comparison_id}/ranking"
COLUMNS = ("ranks", "comment", "tags")


@router.post("/v1/comparisons", status_code=201, response_model=ComparisonView, response_class=JSONResponse)
async def make_comparison(
    body: ComparisonRequest, request: Request, identity: LabelerDep, context: ContextDep
) -> Response:
    """Sample several replies of the live policy to one prompt, to be ranked. For labelers."""
    return await until_gone(request.receive, _sample(body, identity, context))


async def _sample(body: ComparisonRequest, identity: Identity, context: Context) -> Response:
    await context.fleet.settled()
    as_chat = ChatRequest(messages=body.messages, max_tokens=body.max_tokens, temperature=body.temperature)
    asked = Asked(
        user=identity.user(body.user),
        messages=read_messages(body.messages),
        policies=(context.fleet.live_policy(),) * body.count,
        sampling=read_sampling(as_chat, context),
        pairing=Pairing("labeler", 1.0),
        stream=False,
    )
    async with generating(context, asked) as generation:
        await generation.finish()
        return Response(_view(generation).model_dump_json(), 201, media_type="application/json")


def _view(generation: Generation) -> ComparisonView:
    objection = generation.objection()
    comparison_id = generation.stored.comparison_id
    assert comparison_id is not None
    return ComparisonView(
        id=comparison_id,
        replies=[
            ComparedReply(
                position=position,
                reply_id=voice.reply_id,
                content=voice.content,
                finish_reason=voice.finish_reason,
            )
            for position, voice in enumerate(generation.voices)
        ],
        votable=objection is None,
        why_not=objection.code if objection else None,
    )


@router.put(PATH)
async def give_ranking(
    comparison_id: Id,
    body: RankingRequest,
    identity: LabelerDep,
    context: ContextDep,
    key: IdempotencyKey = None,
) -> RankingAnswer:
    """Rank the replies, or change the ranking. Ties are equal ranks."""
    async with context.sessions.begin() as session:
        user_id = await feedback.shown_to(session, comparison_id, identity.user(body.user))
        call = await once(session, user_id, key, f"PUT {comparison_id}/ranking", body)
        if call.answer is not None:
            return RankingAnswer.model_validate(call.answer)
        replies = await feedback.read_replies(session, comparison_id)
        if len(body.ranks) != len(replies):
            raise BadRequest(
                f"ranks: this comparison has {len(replies)} replies, so it needs {len(replies)} ranks.",
                param="ranks",
                code="wrong_number_of_ranks",
            )
        feedback.check_worth_it(replies)
        content = {"ranks": dense(body.ranks), "comment": body.comment, "tags": body.tags}
        ranking, _ = await feedback.store(session, Ranking, comparison_id, user_id, content, context.settings)
        answer = _answer(ranking, replies, context)
        call.remember(answer)
    return answer


@router.get(PATH)
async def read_ranking(
    comparison_id: Id, identity: IdentityDep, context: ContextDep, user: UserQuery = None
) -> RankingAnswer:
    """The ranking as it is stored."""
    async with context.sessions() as session:
        user_id = await feedback.shown_to(session, comparison_id, identity.user(user))
        query = select(Ranking).where(Ranking.comparison_id == comparison_id, Ranking.user_id == user_id)
        ranking = await session.scalar(query)
        if ranking is None:
            raise NotFound("There is no ranking of this comparison yet.", code="ranking_not_found")
        return _answer(ranking, await feedback.read_replies(session, comparison_id), context)


@router.delete(PATH, status_code=204)
async def take_ranking_back(
    comparison_id: Id, identity: IdentityDep, context: ContextDep, user: UserQuery = None
) -> Response:
    """Take the ranking back; that there is none (any more) is fine."""
    async with context.sessions.begin() as session:
        user_id = await feedback.shown_to(session, comparison_id, identity.user(user))
        await feedback.take_back(session, Ranking, comparison_id, user_id, COLUMNS, context.settings)
    return Response(status_code=204)


@router.get(PATH + "/history")
async def read_ranking_history(
    comparison_id: Id, identity: IdentityDep, context: ContextDep, user: UserQuery = None
) -> History:
    """Each time that the ranking was given, revised or undone."""
    async with context.sessions() as session:
        user_id = await feedback.shown_to(session, comparison_id, identity.user(user))
        events = await feedback.read_history(session, comparison_id, user_id, "ranking")
    return History(data=[EventView.model_validate(event) for event in events])


def dense(ranks: list[int]) -> list[int]:
    """The same order and ties without gaps: [2, 2, 5] becomes [1, 1, 2]."""
    order = sorted(set(ranks))
    return [order.index(rank) + 1 for rank in ranks]


def _answer(ranking: Ranking, replies: list[Reply], context: Context) -> RankingAnswer:
    return RankingAnswer(
        comparison_id=ranking.comparison_id,
        ranks=ranking.ranks,
        comment=ranking.comment,
        tags=ranking.tags,
        policies=[reply.policy for reply in replies],
        created_at=ranking.created_at,
        updated_at=ranking.updated_at,
        final_at=feedback.final_at(ranking, context.settings),
    )
