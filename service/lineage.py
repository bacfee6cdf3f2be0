"""`/operator/.../lineage`: from a reply to the votes behind it, and from a vote to every policy that learnt from it."""

from datetime import datetime

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select, text

from service.auth import OPERATOR_ONLY
from service.context import ContextDep
from service.errors import NotFound
from service.schemas import Id
from service.tables import Comparison, Reply

router = APIRouter(prefix="/operator", tags=["operator"], dependencies=[OPERATOR_ONLY])


class Origin(BaseModel):
    """Where a policy comes from."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(description="The policy.")
    parent: str | None = Field(description="The policy that it was trained from; null for the base.")
    state: str = Field(description="What became of it.")
    cycle_id: int | None = Field(description="The cycle that made it.")
    snapshot_sha256: str | None = Field(description="The snapshot that the cycle trained on.")
    num_feedback: int = Field(description="Votes, rankings and demonstrations in that snapshot.")
    created_at: datetime = Field(description="When it was published.")


class ReplyLineage(BaseModel):
    """The way back from a reply."""

    reply_id: str = Field(description="The reply.")
    policies: list[Origin] = Field(
        description="Its policy, then that one's parent, and so on to the base; empty where it was imported."
    )


class Learner(BaseModel):
    """A policy that learnt from a vote."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(description="The policy.")
    directly: bool = Field(
        description="Whether its own snapshot holds the vote; else it descends from one whose does."
    )


class VoteLineage(BaseModel):
    """The way on from a vote or a ranking."""

    kind: str = Field(description="`vote` or `ranking`.")
    id: int = Field(description="Its number, as in snapshots and exports.")
    policies: list[Learner] = Field(description="Every policy that learnt from it, in order.")


class ComparisonLineage(BaseModel):
    """The way on from what people said of a comparison."""

    comparison_id: str = Field(description="The comparison.")
    feedback: list[VoteLineage] = Field(description="Each vote and ranking on it.")


ORIGINS = text(
    """
WITH RECURSIVE line AS (
    SELECT policies.*, 0 AS step FROM policies WHERE name = :policy
    UNION ALL
    SELECT policies.*, step + 1 FROM policies JOIN line ON policies.name = line.parent
)
SELECT line.name, line.parent, line.state, line.cycle_id, cycles.snapshot_sha256, line.created_at,
    coalesce(snapshots.num_feedback, 0) AS num_feedback
FROM line LEFT JOIN cycles ON cycles.id = line.cycle_id LEFT JOIN snapshots ON snapshots.sha256 = cycles.snapshot_sha256
ORDER BY step
"""
)
LEARNERS = text(
    """
WITH RECURSIVE given AS (
    SELECT 'vote' AS kind, id FROM votes WHERE comparison_id = :comparison_id
    UNION ALL
    SELECT 'ranking', id FROM rankings WHERE comparison_id = :comparison_id
), learnt AS (
    SELECT given.kind, given.id, cycles.policy AS name, true AS directly
    FROM given
    JOIN snapshot_feedback AS held ON held.kind = given.kind AND held.feedback_id = given.id::text
    JOIN cycles ON cycles.snapshot_sha256 = held.sha256
    WHERE cycles.policy IS NOT NULL
    UNION
    SELECT learnt.kind, learnt.id, policies.name, false
    FROM learnt JOIN policies ON policies.parent = learnt.name
)
SELECT given.kind, given.id, learnt.name, bool_or(learnt.directly) AS directly
FROM given LEFT JOIN learnt ON learnt.kind = given.kind AND learnt.id = given.id
GROUP BY given.kind, given.id, learnt.name
ORDER BY given.kind DESC, given.id, learnt.name
"""
)


@router.get("/replies/{reply_id}/lineage")
async def read_reply_lineage(reply_id: Id, context: ContextDep) -> ReplyLineage:
    """From a reply: its policy, that policy's cycle and snapshot, and its parents, to the base."""
    async with context.sessions() as session:
        reply = await session.get(Reply, reply_id)
        if reply is None:
            raise NotFound("There is no such reply.", param="reply_id", code="reply_not_found")
        rows = await session.execute(ORIGINS, {"policy": reply.policy})
        return ReplyLineage(reply_id=reply_id, policies=[Origin.model_validate(row) for row in rows])


@router.get("/comparisons/{comparison_id}/lineage")
async def read_comparison_lineage(comparison_id: Id, context: ContextDep) -> ComparisonLineage:
    """From the votes and rankings on a comparison: every policy that learnt from them, itself or by its parents."""
    async with context.sessions() as session:
        if await session.scalar(select(Comparison.id).where(Comparison.id == comparison_id)) is None:
            raise NotFound("There is no such comparison.", param="comparison_id", code="comparison_not_found")
        rows = await session.execute(LEARNERS, {"comparison_id": comparison_id})
        feedback: dict[tuple[str, int], list[Learner]] = {}
        for row in rows:
            learners = feedback.setdefault((row.kind, row.id), [])
            if row.name is not None:
                learners.append(Learner.model_validate(row))
    return ComparisonLineage(
        comparison_id=comparison_id,
        feedback=[
            VoteLineage(kind=kind, id=number, policies=learners)
            for (kind, number), learners in feedback.items()
        ],
    )
