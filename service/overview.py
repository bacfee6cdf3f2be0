"""`/operator/overview` and what goes with it: what the operator's page is drawn from, in few and small answers.

It is asked for again and again, so that each statement reads a bounded number of rows.
"""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from service import duels, policies
from service.auth import OPERATOR_ONLY
from service.context import Context, ContextDep
from service.duel import Rules, Tally, find_interval
from service.errors import NotFound
from service.operator_schemas import ActionView, DeploymentView, DuelView
from service.overview_schemas import (
    CycleFigures,
    DuelCourse,
    DuelPoint,
    Engines,
    Overview,
    PolicyFigures,
    PromptSamples,
    SampleReply,
)
from service.tables import Cycle, Duel, OperatorAction, Vote

NEWEST = 20
"""Policies, cycles, duels and actions that the overview shows."""
MOST_NEW = 5_000
"""New votes that are counted at most."""
MOST_POINTS = 60
SAMPLED_CYCLES = 8

router = APIRouter(prefix="/operator", tags=["operator"], dependencies=[OPERATOR_ONLY])

CYCLES = text(
    """
SELECT id, trigger, stage, reason, policy, created_at, ended_at, metrics->'progress' AS progress,
    (metrics->'snapshot'->>'votes')::integer AS votes, metrics->'reward_model'->'accuracy' AS accuracy,
    (metrics->'reward_model'->>'calibration_error')::float AS calibration_error,
    metrics->'training'->'iterations'->((metrics->'training'->>'kept')::integer) AS kept
FROM cycles ORDER BY id DESC LIMIT :most
"""
)
FIGURES = """
SELECT found.name, found.parent, found.state, found.reason, found.created_at, found.cycle_id, cycles.snapshot_sha256,
    snapshots.num_votes AS votes
FROM {found} AS found
LEFT JOIN cycles ON cycles.id = found.cycle_id LEFT JOIN snapshots ON snapshots.sha256 = cycles.snapshot_sha256
"""
POLICIES = text(
    FIGURES.format(found="(SELECT * FROM policies ORDER BY name DESC LIMIT :most)")
    + "ORDER BY found.name DESC"
)
LINE = text(
    """
WITH RECURSIVE line AS (
    SELECT policies.*, 0 AS step FROM policies WHERE name = :live
    UNION ALL
    SELECT policies.*, step + 1 FROM policies JOIN line ON policies.name = line.parent WHERE step < :most
)
"""
    + FIGURES.format(found="line")
    + "ORDER BY step"
)
SAMPLES = text(
    """
SELECT cycles.id, cycles.policy, policies.parent, cycles.metrics->'samples' AS samples
FROM (SELECT * FROM cycles ORDER BY id DESC LIMIT :most) AS cycles
LEFT JOIN policies ON policies.name = cycles.policy
WHERE jsonb_typeof(cycles.metrics->'samples') = 'array' ORDER BY cycles.id
"""
)


@router.get("/overview")
async def read_overview(context: ContextDep) -> Overview:
    """How the service is: what answers and what is on trial, the engines, and the newest policies, cycles, duels and actions."""
    votes = await context.votes.read(context.sessions)
    replicas = context.fleet.replicas
    async with context.sessions() as session:
        deployment = await policies.read_deployment(session)
        cycles = await session.execute(CYCLES, {"most": NEWEST})
        newest = await session.execute(POLICIES, {"most": NEWEST})
        line = await session.execute(LINE, {"live": deployment.live, "most": NEWEST})
        fought = await session.scalars(select(Duel).order_by(Duel.id.desc()).limit(NEWEST))
        done = await session.scalars(select(OperatorAction).order_by(OperatorAction.id.desc()).limit(NEWEST))
        return Overview(
            deployment=DeploymentView.model_validate(deployment),
            engines=Engines(
                replicas=len(replicas),
                healthy=sum(replica.healthy for replica in replicas),
                policies=context.fleet.policies(),
            ),
            votes=votes,
            new_votes=await _count_new(session, context.settings.cycle_votes),
            cycle_votes=context.settings.cycle_votes,
            duel_votes=context.settings.duel_votes,
            policies=[PolicyFigures.model_validate(row) for row in newest],
            line=[PolicyFigures.model_validate(row) for row in line],
            cycles=[CycleFigures.model_validate(row) for row in cycles],
            duels=[DuelView.model_validate(row) for row in fought],
            actions=[ActionView.model_validate(row) for row in done],
        )


async def _count_new(session: AsyncSession, most: int) -> int:
    """Votes since the last cycle began."""
    since: datetime | None = await session.scalar(select(Cycle.created_at).order_by(Cycle.id.desc()).limit(1))
    votes = select(Vote.created_at).order_by(Vote.created_at.desc()).limit(min(most, MOST_NEW))
    if since is not None:
        votes = votes.where(Vote.created_at > since)
    return await session.scalar(select(func.count()).select_from(votes.subquery())) or 0


@router.get("/duels/{duel_id}/course")
async def read_duel_course(
    duel_id: Annotated[int, Path(ge=1, lt=1 << 63, description="The duel's number.")], context: ContextDep
) -> DuelCourse:
    """How a duel's votes came in, and what they left open after each."""
    async with context.sessions() as session:
        duel = await session.get(Duel, duel_id)
        if duel is None:
            raise NotFound(f"There is no duel {duel_id}.", param="duel_id")
        course = await duels.read_course(session, duel)
        view = DuelView.model_validate(duel)
    return DuelCourse(duel=view, points=_spread(course, context))


def _spread(course: list[tuple[datetime, Tally]], context: Context) -> list[DuelPoint]:
    """Evenly many votes apart."""
    error = context.settings.duel_error
    rules = Rules(max(1, context.settings.duel_votes), error, error)
    step = -(-len(course) // MOST_POINTS) or 1
    points = []
    for at, tally in course[::-1][::step][::-1]:
        interval = find_interval(tally, rules)
        points.append(
            DuelPoint(
                at=at,
                wins=tally.wins,
                losses=tally.losses,
                ties=tally.ties,
                low=interval.low,
                high=interval.high,
            )
        )
    return points


@router.get("/samples")
async def list_samples(context: ContextDep) -> list[PromptSamples]:
    """What the policies of the last cycles answered to the same guard prompts."""
    async with context.sessions() as session:
        rows = (await session.execute(SAMPLES, {"most": SAMPLED_CYCLES})).all()
    asked: dict[str, dict[str, str]] = {}
    for row in rows:
        for sample in row.samples:
            replies = asked.setdefault(sample["prompt"], {})
            if row.parent is not None:
                replies.setdefault(row.parent, sample["before"])
            replies[row.policy or f"cycle {row.id}, refused"] = sample["after"]
    return [
        PromptSamples(
            prompt=prompt,
            replies=[SampleReply(policy=policy, content=said) for policy, said in replies.items()],
        )
        for prompt, replies in asked.items()
    ]
