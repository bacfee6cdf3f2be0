"""`/operator/...`: policies, the pointer, duels and cycles, for whoever runs Ratchet. What is done is recorded with who, when, why."""

from typing import Annotated

from fastapi import APIRouter, Path
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from service import duels, metrics, policies, ratings
from service.auth import OPERATOR_ONLY, OperatorDep
from service.context import Context, ContextDep
from service.errors import Conflict, EngineUnavailable, NotFound
from service.keyring import Identity
from service.operator_schemas import (
    ActionView,
    CycleRequest,
    CycleView,
    DeploymentView,
    DuelView,
    MoveRequest,
    PolicyView,
    RatingView,
)
from service.tables import Cycle, Deployment, Duel, OperatorAction, Policy

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
async def roll_back(
    identity: OperatorDep, context: ContextDep, body: MoveRequest | None = None
) -> DeploymentView:
    """Exchange the live policy and the previous one."""
    async with context.sessions.begin() as session:
        deployment = await policies.roll_back(session)
        _check_meant(body, deployment.live)
        _check_ready(deployment.live, context)  # raising undoes the exchange
        record(session, identity, "rollback", deployment.live, body.reason if body else None)
    metrics.ROLLBACKS.inc()
    return _moved(deployment, context)


@router.post("/promote")
async def promote(
    identity: OperatorDep, context: ContextDep, body: MoveRequest | None = None
) -> DeploymentView:
    """Let the challenger on trial go live now, whatever the votes say so far."""
    async with context.sessions.begin() as session:
        challenger = await _on_trial(session)
        _check_meant(body, challenger)
        if (await session.get_one(Policy, challenger)).state != "verified":
            raise Conflict(
                f"{challenger} is not verified yet. Try again in a moment.", code="policy_not_verified"
            )
        _check_ready(challenger, context)
        deployment = await policies.promote(session, challenger)
        if deployment is not None:
            await duels.watch(session, deployment, context.settings)
        record(session, identity, "promote", challenger, body.reason if body else None)
    metrics.SWAPS.labels("promoted").inc()
    return _moved(deployment, context)


@router.post("/reject")
async def reject(
    identity: OperatorDep, context: ContextDep, body: MoveRequest | None = None
) -> DeploymentView:
    """End the trial of the challenger; live stays."""
    async with context.sessions.begin() as session:
        challenger = await _on_trial(session)
        _check_meant(body, challenger)
        deployment = await policies.reject(session, challenger, "An operator rejected it.")
        record(session, identity, "reject", challenger, body.reason if body else None)
    return _moved(deployment, context)


@router.get("/duels")
async def list_duels(context: ContextDep) -> list[DuelView]:
    """Every duel, the newest first."""
    async with context.sessions() as session:
        rows = await session.scalars(select(Duel).order_by(Duel.id.desc()))
        return [DuelView.model_validate(row) for row in rows]


@router.get("/ratings")
async def list_ratings(context: ContextDep) -> list[RatingView]:
    """How good every policy is by the votes of all duels, the strongest first."""
    async with context.sessions() as session:
        tallies = await ratings.read_tallies(session)
    return [RatingView.model_validate(rating) for rating in await ratings.rate(tallies)]


@router.get("/actions")
async def list_actions(context: ContextDep) -> list[ActionView]:
    """What operators did: the last thousand actions, the newest first."""
    async with context.sessions() as session:
        rows = await session.scalars(select(OperatorAction).order_by(OperatorAction.id.desc()).limit(1000))
        return [ActionView.model_validate(row) for row in rows]


async def _on_trial(session: AsyncSession) -> str:
    """The challenger's name. Raises Conflict where there is none. Until the transaction ends it stays what it is."""
    challenger = (await policies.lock_deployment(session)).challenger
    if challenger is None:
        raise Conflict("No policy is on trial.", code="no_challenger")
    return challenger


def _check_meant(body: MoveRequest | None, policy: str) -> None:
    """Raises Conflict where the pointer has moved since the operator looked at it."""
    if body is not None and body.policy not in (None, policy):
        raise Conflict(
            f"By now this would be done to {policy}. Look again, then try again.",
            param="policy",
            code="changed_meanwhile",
        )


def _check_ready(policy: str, context: Context) -> None:
    """Raises EngineUnavailable where it would have to be loaded first; where weights are exchanged it always has."""
    if policy not in context.fleet.policies() and not context.fleet.exchanges_weights:
        raise EngineUnavailable(f"No engine has {policy} loaded yet. Try again in a moment.")


def record(session: AsyncSession, identity: Identity, action: str, subject: str, reason: str | None) -> None:
    """Put on record what is done, in its transaction."""
    session.add(OperatorAction(account=identity.account, action=action, subject=subject, reason=reason))


def _moved(deployment: Deployment | None, context: Context) -> DeploymentView:
    """Answer by it from now on. The pointer was locked: the challenger could not be taken away meanwhile."""
    assert deployment is not None
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
async def start_cycle(
    identity: OperatorDep, context: ContextDep, body: CycleRequest | None = None
) -> CycleView:
    """Ask for a cycle now; the trainer picks it up within its tick."""
    async with context.sessions.begin() as session:
        await session.execute(text("LOCK TABLE cycles IN SHARE ROW EXCLUSIVE MODE"))  # two askers, one cycle
        open_id = await session.scalar(select(Cycle.id).where(Cycle.ended_at.is_(None)))
        if open_id is not None:
            raise Conflict(f"Cycle {open_id} is still running.", code="cycle_running")
        asked = {"method": body.method} if body and body.method else {}
        cycle = Cycle(trigger="operator", stage="requested", metrics=asked)
        session.add(cycle)
        await session.flush()
        await session.refresh(cycle)
        record(session, identity, "start cycle", str(cycle.id), body.reason if body else None)
        return CycleView.model_validate(cycle)
