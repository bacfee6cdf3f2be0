"""`Idempotency-Key`: a call repeated with the same key does nothing new and gets the same answer.

The key is taken within the call's own transaction: two at the same instant take turns, and one that fails leaves no trace.
Keys are forgotten a day later.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Header
from pydantic import BaseModel
from sqlalchemy import delete, func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import Conflict
from service.schemas import Text
from service.tables import IdempotentCall

KEPT_HOURS = 24
IdempotencyKey = Annotated[
    Text | None,
    Header(
        alias="idempotency-key",
        min_length=1,
        max_length=200,
        description="A call repeated with the same key does nothing new and gets the same answer, for a day.",
    ),
]


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is being made once."""

    row: IdempotentCall | None
    """None without a key."""
    answer: dict[str, Any] | None
    """What it was answered before; None where it is new."""

    def remember(self, answer: BaseModel) -> None:
        """Keep the answer; the caller commits it with the effect."""
        if self.row is not None:
            self.row.answer = answer.model_dump(mode="json")


async def once(session: AsyncSession, user_id: int, key: str | None, what: str, body: BaseModel) -> Call:
    """Take the key. Raises Conflict where it was used for another call. `what`: names the call beside its body."""
    if key is None:
        return Call(None, None)
    sha256 = hashlib.sha256(f"{what}\n{body.model_dump_json()}".encode()).hexdigest()
    old = func.now() - func.make_interval(0, 0, 0, 0, KEPT_HOURS)
    await session.execute(
        delete(IdempotentCall).where(IdempotentCall.user_id == user_id, IdempotentCall.created_at < old)
    )
    made = await session.scalar(
        insert(IdempotentCall)
        .values(user_id=user_id, key=key, request_sha256=sha256, answer={})
        .on_conflict_do_nothing()
        .returning(IdempotentCall)
    )
    if made is not None:
        return Call(made, None)
    known = await session.get_one(IdempotentCall, (user_id, key))
    if known.request_sha256 != sha256:
        raise Conflict(
            "This Idempotency-Key was used for another call. Use a fresh one.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return Call(known, known.answer)
