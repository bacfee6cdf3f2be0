"""Users: finding them, what they set, and their removal. `/v1/users/me`, and the operator's `/operator/users`."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from service import removal
from service.auth import OPERATOR_ONLY, IdentityDep
from service.context import Context, ContextDep
from service.feedback_schemas import Removed, UserSettings, UserView
from service.journal import UserName
from service.schemas import Name, Text
from service.tables import User

router = APIRouter(tags=["users"])
UserQuery = Annotated[
    Name | None, Query(description="The `user` of the chat requests; leave it out where they named none.")
]


async def find_user(session: AsyncSession, user: UserName) -> int | None:
    """The user's id, or None."""
    return await session.scalar(select(User.id).where(User.account == user.account, User.name == user.name))


async def make_user(session: AsyncSession, user: UserName) -> int:
    """The user's id; made on first sight, also by two requests at once."""
    known = await find_user(session, user)
    if known is not None:
        return known
    query = (
        insert(User)
        .values(account=user.account, name=user.name)
        .on_conflict_do_update(index_elements=[User.account, User.name], set_={"name": user.name})
        .returning(User.id)
    )
    return (await session.execute(query)).scalar_one()


@router.get("/v1/users/me")
async def read_me(identity: IdentityDep, context: ContextDep, user: UserQuery = None) -> UserView:
    """Who the service takes you for, and what you set."""
    who = identity.user(user)
    async with context.sessions() as session:
        query = select(User.compares).where(User.account == who.account, User.name == who.name)
        compares = await session.scalar(query)
    return UserView(account=who.account, user=who.name, role=identity.role, compares=compares is not False)


@router.patch("/v1/users/me")
async def change_me(
    body: UserSettings, identity: IdentityDep, context: ContextDep, user: UserQuery = None
) -> UserView:
    """Opt out of comparisons that the service chooses to show, and of training on prompts that you did not vote on; or in again."""
    who = identity.user(user)
    async with context.sessions.begin() as session:
        row = await session.get_one(User, await make_user(session, who))
        row.compares = body.compares
    return UserView(account=who.account, user=who.name, role=identity.role, compares=body.compares)


@router.delete("/v1/users/me")
async def remove_me(identity: IdentityDep, context: ContextDep, user: UserQuery = None) -> Removed:
    """Remove all that you wrote, were answered, and voted. Says which policies were trained on it."""
    return await _remove(context, identity.user(user))


@router.delete("/operator/users", tags=["operator"], dependencies=[OPERATOR_ONLY])
async def remove_user(
    context: ContextDep,
    user: Annotated[Name, Query(description="The user's name.")],
    account: Annotated[Text, Query(description="The user's account; empty without keys.")] = "",
) -> Removed:
    """Remove a user's content and votes, for them."""
    return await _remove(context, UserName(account, user))


async def _remove(context: Context, user: UserName) -> Removed:
    """Delete everything in one transaction. Raises NotFound where there is no such user."""
    async with context.sessions.begin() as session:
        user_id = await removal.lock_user(session, user)
        policies = await removal.trained_on(session, user_id)
        removed = await removal.remove_user(session, user_id)
    return Removed(policies=policies, **asdict(removed))
