"""`/v1/demonstrations`: replies that people write, or correct from ours. For labelers."""

import secrets

from fastapi import APIRouter, Response
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from service import removal
from service.auth import LabelerDep
from service.context import ContextDep
from service.errors import BadRequest, NotFound
from service.feedback_schemas import DemonstrationList, DemonstrationRequest, DemonstrationView
from service.idempotency import IdempotencyKey, once
from service.journal import UserName
from service.schemas import Before, Id, Limit, read_messages
from service.tables import Demonstration, Prompt, Reply, User
from service.users import UserQuery, make_user

router = APIRouter(tags=["demonstrations"])
PATH = "/v1/demonstrations"


@router.post(PATH, status_code=201)
async def add_demonstration(
    body: DemonstrationRequest, identity: LabelerDep, context: ContextDep, key: IdempotencyKey = None
) -> DemonstrationView:
    """Store a reply that a person wrote to `messages`, or in place of the reply that `corrects` names."""
    if (body.messages is None) == (body.corrects is None):
        raise BadRequest(
            "Give either `messages` or `corrects`.", param="messages", code="messages_or_corrects"
        )
    user = identity.user(body.user)
    async with context.sessions.begin() as session:
        user_id = await make_user(session, user)
        call = await once(session, user_id, key, f"POST {PATH}", body)
        if call.answer is not None:
            return DemonstrationView.model_validate(call.answer)
        corrected = await _reply(session, body.corrects, user) if body.corrects else None
        prompt = await _prompt(session, body, corrected, user_id)
        row = Demonstration(
            id=f"dem-{secrets.token_hex(16)}",
            prompt_id=prompt.id,
            user_id=user_id,
            content=body.content,
            corrects=body.corrects,
            corrected=corrected.content if corrected else None,
            comment=body.comment,
            tags=body.tags,
        )
        session.add(row)
        await session.flush()
        await session.refresh(row)
        answer = _view(row, prompt)
        call.remember(answer)
    return answer


@router.get(PATH)
async def list_demonstrations(
    identity: LabelerDep,
    context: ContextDep,
    user: UserQuery = None,
    limit: Limit = 20,
    before: Before = None,
) -> DemonstrationList:
    """Your demonstrations, the newest first."""
    who = identity.user(user)
    owner = select(User.id).where(User.account == who.account, User.name == who.name).scalar_subquery()
    newest_first = (Demonstration.created_at.desc(), Demonstration.id.desc())
    # The page's ids come from an index alone: however many there are, only those on the page are read.
    page = (
        select(Demonstration.id)
        .where(Demonstration.user_id == owner)
        .order_by(*newest_first)
        .limit(limit + 1)
    )
    async with context.sessions() as session:
        if before is not None:
            last = await _owned(session, before, who)
            older = func.row(Demonstration.created_at, Demonstration.id) < func.row(last.created_at, last.id)
            page = page.where(older)
        query = select(Demonstration, Prompt).join(Prompt, Prompt.id == Demonstration.prompt_id)
        query = query.where(Demonstration.id.in_(page)).order_by(*newest_first)
        rows = (await session.execute(query)).all()
    return DemonstrationList(
        data=[_view(row, prompt) for row, prompt in rows[:limit]], has_more=len(rows) > limit
    )


@router.delete(PATH + "/{demonstration_id}", status_code=204)
async def delete_demonstration(
    demonstration_id: Id, identity: LabelerDep, context: ContextDep, user: UserQuery = None
) -> Response:
    """Delete a demonstration of yours."""
    async with context.sessions.begin() as session:
        row = await _owned(session, demonstration_id, identity.user(user))
        await removal.note(session, Demonstration, Demonstration.id == row.id)
        await session.execute(delete(Demonstration).where(Demonstration.id == row.id))
        if row.corrects is None:  # else the prompt is its reply's
            await session.execute(delete(Prompt).where(Prompt.id == row.prompt_id))
    return Response(status_code=204)


async def _reply(session: AsyncSession, reply_id: str, user: UserName) -> Reply:
    """Raises NotFound where it is no reply to this user, or did not end."""
    query = (
        select(Reply)
        .join(Prompt, Prompt.id == Reply.prompt_id)
        .join(User, User.id == Prompt.user_id)
        .where(Reply.id == reply_id, User.account == user.account, User.name == user.name)
    )
    reply = await session.scalar(query)
    if reply is None or reply.content is None:
        raise NotFound(
            "This user was shown no such reply. `corrects` takes a `reply_id` of a chat answer.",
            param="corrects",
            code="reply_not_found",
        )
    return reply


async def _prompt(
    session: AsyncSession, body: DemonstrationRequest, corrected: Reply | None, user_id: int
) -> Prompt:
    """The corrected reply's prompt, or a new one."""
    if corrected is not None:
        return await session.get_one(Prompt, corrected.prompt_id)
    messages = read_messages(body.messages or [])
    prompt = Prompt(user_id=user_id, messages=[{"role": m.role, "content": m.content} for m in messages])
    session.add(prompt)
    await session.flush()
    return prompt


async def _owned(session: AsyncSession, demonstration_id: str, user: UserName) -> Demonstration:
    query = (
        select(Demonstration)
        .join(User, User.id == Demonstration.user_id)
        .where(Demonstration.id == demonstration_id, User.account == user.account, User.name == user.name)
    )
    row = await session.scalar(query)
    if row is None:
        raise NotFound("This user has no such demonstration.", param="id", code="demonstration_not_found")
    return row


def _view(row: Demonstration, prompt: Prompt) -> DemonstrationView:
    return DemonstrationView(
        id=row.id,
        messages=prompt.messages,
        content=row.content,
        corrects=row.corrects,
        corrected=row.corrected,
        comment=row.comment,
        tags=row.tags,
        created_at=row.created_at,
    )
