"""`/operator/...`: policies, the pointer and cycles, for whoever runs Ratchet. From this machine only."""

from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request
from sqlalchemy import select, text

from service import metrics, policies
from service.context import ContextDep
from service.errors import Conflict, EngineUnavailable, Forbidden, NotFound
from service.schemas import CycleView, DeploymentView, PolicyView
from service.tables import Cycle, Policy


def from_this_machine(request: Request) -> None:
    """Raises Forbidden for other machines, and for a web page that makes the operator's browser ask.

    A foreign page gives itself away by `Origin`, or, where its name was pointed at loopback, by `Host`.
    """
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    local = request.client is not None and _is_loopback(request.client.host)
    if not local or not _is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise Forbidden("The operator's API answers on this machine only (127.0.0.1).", code="not_loopback")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden("The operator's API does not answer other sites' pages.", code="foreign_origin")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


router = APIRouter(prefix="/operator", tags=["operator"], dependencies=[Depends(from_this_machine)])


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
    metrics.show_live(deployment.live)
    return DeploymentView.model_validate(deployment)


@router.get("/cycles")
async def list_cycles(context: ContextDep) -> list[CycleView]:
    """Every cycle, the newest first."""
    async with context.sessions() as session:
        rows = await session.scalars(select(Cycle).order_by(Cycle.id.desc()))
        return [CycleView.model_validate(row) for row in rows]


@router.get("/cycles/{cycle_id}")
async def read_cycle(cycle_id: int, context: ContextDep) -> CycleView:
    """One cycle, as far as it is."""
    async with context.sessions() as session:
        cycle = await session.get(Cycle, cycle_id) if 0 < cycle_id < 1 << 63 else None
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
