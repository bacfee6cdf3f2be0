"""What votes and rankings have in common: whose a comparison is, what may be said of it and until when, and its history."""

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from service import removal
from service.errors import Conflict, NotFound
from service.journal import UserName
from service.pairing import objection
from service.settings import Settings
from service.tables import Comparison, ComparisonReply, FeedbackEvent, Ranking, Reply, User, Vote

Kind = Literal["vote", "ranking"]
Change = Literal["given", "revised"]


async def shown_to(session: AsyncSession, comparison_id: str, user: UserName) -> int:
    """The user's id. Raises NotFound where the comparison was not shown to this user."""
    query = (
        select(User.id)
        .join(Comparison, Comparison.user_id == User.id)
        .where(Comparison.id == comparison_id, User.account == user.account, User.name == user.name)
    )
    user_id = await session.scalar(query)
    if user_id is None:
        raise NotFound(
            "No such comparison was shown to this user. The field `user` must be that of the chat request.",
            param="id",
            code="comparison_not_found",
        )
    return user_id


async def read_replies(session: AsyncSession, comparison_id: str) -> list[Reply]:
    """In the order shown."""
    query = (
        select(Reply)
        .join(ComparisonReply, ComparisonReply.reply_id == Reply.id)
        .where(ComparisonReply.comparison_id == comparison_id)
        .order_by(ComparisonReply.position)
    )
    return list(await session.scalars(query))


def check_worth_it(replies: list[Reply]) -> None:
    """Raises Conflict where a choice between them would say nothing."""
    against = objection([(reply.content, reply.finish_reason) for reply in replies])
    if against is not None:
        raise Conflict(against.message, code=against.code)


def final_at(row: Vote | Ranking, settings: Settings) -> datetime:
    """Until when it may be changed or taken back."""
    return row.created_at + timedelta(seconds=settings.vote_revision_seconds)


async def store(
    session: AsyncSession,
    table: type[Vote] | type[Ranking],
    comparison_id: str,
    user_id: int,
    content: dict[str, Any],
    settings: Settings,
) -> tuple[Any, Change | None]:
    """Insert or revise, with a line of history; the same again changes nothing (None). Raises Conflict where it is final."""
    made = await session.scalar(
        insert(table)
        .values(comparison_id=comparison_id, user_id=user_id, **content)
        .on_conflict_do_nothing(index_elements=["comparison_id", "user_id"])
        .returning(table)
    )
    if made is not None:
        _note(session, made, "given", content)
        return made, "given"
    row = await _locked(session, table, comparison_id, user_id)
    if row is None:  # taken back at this very moment
        raise Conflict("It was taken back meanwhile. Try again.", code="changed_meanwhile")
    if all(getattr(row, name) == value for name, value in content.items()):
        return row, None
    _check_not_final(row, settings)
    for name, value in content.items():
        setattr(row, name, value)
    row.updated_at = func.now()
    _note(session, row, "revised", content)
    await session.flush()
    await session.refresh(row)
    return row, "revised"


async def take_back(
    session: AsyncSession,
    table: type[Vote] | type[Ranking],
    comparison_id: str,
    user_id: int,
    columns: tuple[str, ...],
    settings: Settings,
) -> None:
    """Delete it, with a line of history; that there is none is fine. Raises Conflict where it is final."""
    row = await _locked(session, table, comparison_id, user_id)
    if row is not None:
        _check_not_final(row, settings)
        _note(session, row, "undone", {name: getattr(row, name) for name in columns})
        await removal.note(session, table, table.id == row.id)
        await session.execute(delete(table).where(table.id == row.id))


async def read_history(
    session: AsyncSession, comparison_id: str, user_id: int, kind: Kind
) -> list[FeedbackEvent]:
    """The oldest first."""
    query = (
        select(FeedbackEvent)
        .where(
            FeedbackEvent.comparison_id == comparison_id,
            FeedbackEvent.user_id == user_id,
            FeedbackEvent.kind == kind,
        )
        .order_by(FeedbackEvent.id)
    )
    return list(await session.scalars(query))


async def _locked(
    session: AsyncSession, table: type[Vote] | type[Ranking], comparison_id: str, user_id: int
) -> Any:
    query = select(table).where(table.comparison_id == comparison_id, table.user_id == user_id)
    return await session.scalar(query.with_for_update())


def _check_not_final(row: Vote | Ranking, settings: Settings) -> None:
    if datetime.now(UTC) > final_at(row, settings):
        raise Conflict(
            f"It was given more than {settings.vote_revision_seconds:g} s ago and stays as it is.",
            code="vote_final",
        )


def _note(session: AsyncSession, row: Vote | Ranking, action: str, content: dict[str, Any]) -> None:
    kind: Kind = "vote" if isinstance(row, Vote) else "ranking"
    session.add(
        FeedbackEvent(
            comparison_id=row.comparison_id, user_id=row.user_id, kind=kind, action=action, content=content
        )
    )
