"""`/metrics`: what Prometheus asks for. For the operator: metrics count by policy, which would tell a voter who answered."""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service import learning_metrics
from service.auth import OPERATOR_ONLY
from service.context import ContextDep
from service.errors import NotFound

router = APIRouter(prefix="/metrics", tags=["service"], dependencies=[OPERATOR_ONLY])


@router.get("", response_class=PlainTextResponse)
async def metrics_text(context: ContextDep) -> Response:
    """Metrics of this process, and of what the database knows, for Prometheus."""
    await learning_metrics.refresh(context.sessions)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@router.get("/engines/{number}", response_class=PlainTextResponse)
async def engine_metrics_text(
    number: Annotated[
        int,
        Path(ge=0, lt=1 << 16, description="Which engine, from 0, as `GET /operator/replicas` lists them."),
    ],
    context: ContextDep,
) -> Response:
    """An engine's own metrics, handed on as they are (`vllm:...`): nobody but the service can reach it."""
    replicas = context.fleet.replicas
    if number >= len(replicas):
        raise NotFound(f"There is no engine {number}; there are {len(replicas)}, from 0.", param="number")
    return Response(await replicas[number].engine.metrics(), media_type=CONTENT_TYPE_LATEST)
