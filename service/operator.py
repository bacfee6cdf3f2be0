"""`/operator/...`: policies, the pointer and cycles, for whoever runs Ratchet."""

from typing import Annotated

from fastapi import APIRouter, Path
from sqlalchemy import select, text

from service import metrics, policies
from service.auth import OPERATOR_ONLY
from service.context import ContextDep
from service.errors import Conflict, EngineUnavailable, NotFound
from service.operator_schemas import CycleView, DeploymentView, PolicyView
from service.tables import Cycle, Policy

router = APIRouter(prefix="/operator", tags=["operator"], dependencies=[OPERATOR_ONLY])


@router.get("/policies")
async def list_policies(context: ContextDep) -> list[PolicyView]:
    """Every policy, the newest first."""
    async with context.sessions() as session:
        rows = await session.scalars(select(Policy).order_by(Policy.name.desc()))
        return [PolicyView.model_validate(row) for row in rows]


@router.get("/deployment")
async def read_deployment(context: ContextDep) -> DeploymentView:
    """Which policy is live, on trial, and to fall back to."""
    async with context.sessions() as session:
        return DeploymentView.model_validate(await policies.read_deployment(session))


@router.post("/rollback")
async def roll_back(context: ContextDep) -> DeploymentView:
    """Exchange the live policy and the previous one."""
    async with context.sessions.begin() as session:
        deployment = await policies.roll_back(session)
        if deployment.live not in context.fleet.policies():  # raising undoes the exchange
            raise EngineUnavailable(f"No engine has {deployment.live} loaded yet. Try again in a moment.")
    metrics.ROLLBACKS.inc()
    context.fleet.point(deployment)
    return DeploymentView.model_validate(deployment)


@router.get("/cycles")
async def list_cycles(context: ContextDep) -> list[CycleView]:
    """Every cycle, the newest first."""
    async with context.sessions() as session:
        rows = await session.scalars(select(Cycle).order_by(Cycle.id.desc()))
        return [CycleView.model_validate(row) for row in rows]


@router.get("/cycles/{cycle_id}")
async def read_cycle(
    cycle_id: Annotated[int, Path(ge=1, lt=1 << 63, description="The cycle's number.")], context: ContextDep
) -> CycleView:
    """One cycle, as far as it is."""
    async with context.sessions() as session:
        cycle = await session.get(Cycle, cycle_id)
        if cycle is None:
            raise NotFound(f"There is no cycle {cycle_id}.", param="cycle_id")
        return CycleView.model_validate(cycle)


@router.post("/cycles", status_code=201)
async def start_cycle(context: ContextDep) -> CycleView:
    """Ask for a cycle now; the trainer picks it up within its tick."""
    async with context.sessions.begin() as session:
        await session.execute(text("LOCK TABLE cycles IN SHARE ROW EXCLUSIVE MODE"))  # two askers, one cycle
        open_id = await session.scalar(select(Cycle.id).where(Cycle.ended_at.is_(None)))
        if open_id is not None:
            raise Conflict(f"Cycle {open_id} is still running.", code="cycle_running")
        cycle = Cycle(trigger="operator", stage="requested")
        session.add(cycle)
        await session.flush()
        await session.refresh(cycle)
        return CycleView.model_validate(cycle)
