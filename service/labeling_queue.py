"""`GET /v1/comparisons/queue`: prompts that are worth a labeler's time next. For labelers.

A vote `neither` says that a good answer is missing, a tie that two samples did not differ: more answers, ranked, or one that
a person wrote, teach most there. A labeler is shown the prompts of all users of their own account, of no other.
"""

from fastapi import APIRouter
from sqlalchemy import case, func, select

from service.auth import LabelerDep
from service.context import ContextDep
from service.feedback_schemas import LabelingQueue, QueueItem
from service.schemas import Limit
from service.tables import Comparison, Prompt, User, Vote

router = APIRouter(tags=["rankings"])
LOOKED_AT = 1000
"""How many of the newest votes are looked at, of all accounts: so the call costs the same however many there are."""


@router.get("/v1/comparisons/queue")
async def read_queue(
    identity: LabelerDep,
    context: ContextDep,
    limit: Limit = 20,
) -> LabelingQueue:
    """Prompts on which a late vote said `neither` (first) or `tie`, of your account; the newest first."""
    newest = (
        select(Vote.comparison_id, Vote.user_id, Vote.choice, Vote.created_at)
        .order_by(Vote.created_at.desc())
        .limit(LOOKED_AT)
        .subquery()
    )
    account = select(User.account).where(User.id == newest.c.user_id).scalar_subquery()
    order = (case((newest.c.choice == "neither", 0), else_=1), newest.c.created_at.desc())
    # Cut to the few that are shown before their prompts are looked up: for a thousand, PostgreSQL would read them all.
    chosen = (
        select(newest, func.row_number().over(order_by=order).label("place"))
        # Not joined: PostgreSQL would then look through all users of the account.
        .where(account == identity.account, newest.c.choice.in_(("neither", "tie")))
        .order_by(*order)
        .limit(limit)
        .subquery()
    )
    query = (
        select(chosen.c.comparison_id, chosen.c.choice, chosen.c.created_at, Prompt.messages)
        .join(Comparison, Comparison.id == chosen.c.comparison_id)
        .join(Prompt, Prompt.id == Comparison.prompt_id)
        .order_by(chosen.c.place)
    )
    async with context.sessions() as session:
        rows = (await session.execute(query)).all()
    return LabelingQueue(
        data=[
            QueueItem(comparison_id=comparison_id, choice=choice, messages=messages, voted_at=voted_at)
            for comparison_id, choice, voted_at, messages in rows
        ]
    )
