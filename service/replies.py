"""Stores prompts, replies and comparisons. Each function is one short transaction, committed on return.

Used by `chat.py`: `begin` before a reply's id leaves the service, `end` before its last chunk does.
"""

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service.engine import Message, Sampling
from service.pairing import Pairing
from service.tables import Comparison, ComparisonReply, Prompt, Reply, User

Sessions = async_sessionmaker[AsyncSession]


@dataclass(frozen=True, slots=True)
class Stored:
    """The ids of what is under way. `reply_ids` are in the order shown."""

    reply_ids: tuple[str, ...]
    comparison_id: str | None

    @property
    def id(self) -> str:
        """The id of the whole answer."""
        return self.comparison_id or self.reply_ids[0]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a reply ended: `stop`, `length`, `error` or `abort`."""

    content: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


async def begin(
    sessions: Sessions,
    *,
    user: str,
    messages: Sequence[Message],
    policy: str,
    sampling: Sampling,
    pairing: Pairing | None,
) -> Stored:
    """Store a prompt with one running reply, or with two and their comparison."""
    count = 1 if pairing is None else 2
    reply_ids = tuple(f"chatcmpl-{secrets.token_hex(16)}" for _ in range(count))
    comparison_id = None if pairing is None else f"cmp-{secrets.token_hex(16)}"
    async with sessions.begin() as session:
        user_id = await _user_id(session, user)
        prompt = Prompt(user_id=user_id, messages=[asdict(message) for message in messages])
        session.add(prompt)
        await session.flush()
        for reply_id in reply_ids:
            session.add(Reply(id=reply_id, prompt_id=prompt.id, policy=policy, sampling=asdict(sampling)))
        if pairing is not None:
            session.add(
                Comparison(
                    id=comparison_id,
                    prompt_id=prompt.id,
                    user_id=user_id,
                    reason=pairing.reason,
                    propensity=pairing.propensity,
                )
            )
            await session.flush()
            for position, reply_id in enumerate(reply_ids):
                session.add(
                    ComparisonReply(comparison_id=comparison_id, position=position, reply_id=reply_id)
                )
    return Stored(reply_ids, comparison_id)


async def _user_id(session: AsyncSession, name: str) -> int:
    """The user's id; made on first sight, also by two requests at once."""
    known = select(User.id).where(User.name == name)
    user_id = await session.scalar(known)
    if user_id is None:
        user_id = await session.scalar(
            insert(User)
            .values(name=name)
            .on_conflict_do_update(index_elements=[User.name], set_={"name": name})
            .returning(User.id)
        )
    assert user_id is not None
    return user_id


async def end(sessions: Sessions, reply_id: str, ended: Ended) -> None:
    """Store how a reply ended."""
    async with sessions.begin() as session:
        await session.execute(
            update(Reply).where(Reply.id == reply_id).values(**asdict(ended), ended_at=func.now())
        )
