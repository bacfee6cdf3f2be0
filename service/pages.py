"""The pages at `/`, `/label` and `/operator`, what they are made of, and how the service is: health, status, models."""

import asyncio
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from sqlalchemy import func, select

from service import policies
from service.auth import KNOWN_CALLER
from service.context import ContextDep
from service.errors import EngineUnavailable, NotFound
from service.schemas import ALIAS, Health, Id, Model, ModelList, Readiness, Status
from service.tables import Cycle, Policy

WEB = Path(__file__).parent / "web"
CHARTS = Path(str(files("chartkick") / "django" / "static" / "chartkick"))
READY_SECONDS = 10.0
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

router = APIRouter(tags=["service"])


@router.get("/", include_in_schema=False)
async def index() -> FileResponse:
    """The page to chat and vote in."""
    return FileResponse(WEB / "index.html", headers=PAGE_HEADERS)


@router.get("/operator", include_in_schema=False)
async def operator_page() -> FileResponse:
    """The operator's page. It holds nothing secret: what it shows, it asks for with the operator's key."""
    return FileResponse(WEB / "operator.html", headers=PAGE_HEADERS)


@router.get("/label", include_in_schema=False)
async def labeler() -> FileResponse:
    """The page on which labelers rank and write."""
    return FileResponse(WEB / "labeler.html", headers=PAGE_HEADERS)


class WebFiles(StaticFiles):
    """Files with the pages' headers: a browser asks for each anew, so that no page is made of two versions."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(PAGE_HEADERS)
        return response


def mount_files(app: FastAPI) -> None:
    """Serve the pages' scripts and styles, and Chart.js, which the operator's page loads."""
    app.mount("/web", WebFiles(directory=WEB))
    app.mount("/charts", StaticFiles(directory=CHARTS))


@router.get("/healthz")
async def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz")
async def readyz(context: ContextDep) -> Readiness:
    """The database answers, and the live policy, verified on a replica, has just generated a token."""
    async with context.sessions() as session:
        live = (await policies.read_deployment(session)).live
    replica = context.fleet.route(live)
    try:
        async with asyncio.timeout(READY_SECONDS):
            await replica.engine.complete_one(live)
    except TimeoutError:
        raise EngineUnavailable(f"The engine gave no token within {READY_SECONDS:g} s.") from None
    return Readiness(live=live)


@router.get("/v1/models", dependencies=[KNOWN_CALLER])
async def list_models(context: ContextDep) -> ModelList:
    """What can be asked for as `model`."""
    names = context.fleet.policies()
    async with context.sessions() as session:
        rows = await session.execute(select(Policy.name, Policy.created_at).where(Policy.name.in_(names)))
        created = {row.name: int(row.created_at.timestamp()) for row in rows}
    newest = max(created.values(), default=0)
    return ModelList(
        data=[
            Model(id=ALIAS, created=newest),
            *(Model(id=name, created=created[name]) for name in sorted(created)),
        ]
    )


@router.get("/v1/models/{name}", dependencies=[KNOWN_CALLER])
async def read_model(name: Id, context: ContextDep) -> Model:
    """One of them."""
    for model in (await list_models(context)).data:
        if model.id == name:
            return model
    raise NotFound(f"There is no model {name[:100]!r}.", param="model", code="model_not_found")


@router.get("/v1/status", dependencies=[KNOWN_CALLER])
async def status(context: ContextDep) -> Status:
    """How far the loop is."""
    votes = await context.votes.read(context.sessions)
    async with context.sessions() as session:
        return Status(
            live=(await policies.read_deployment(session)).live,
            votes=votes,
            cycles=await session.scalar(select(func.count()).select_from(Cycle)) or 0,
            cycle_stage=await session.scalar(select(Cycle.stage).where(Cycle.ended_at.is_(None)).limit(1)),
        )
