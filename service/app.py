"""The FastAPI application: what runs beside requests, the one error handler, the routers. READ FIRST."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

import aiohttp
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service import (
    activity,
    chat,
    conversations,
    demonstrations,
    docs,
    exports,
    imports,
    keys,
    labeling_queue,
    lineage,
    markdown,
    metrics,
    operator,
    operator_replicas,
    overview,
    pages,
    rankings,
    scrape,
    tracing,
    users,
    votes,
)
from service.adapter_delivery import AdapterDelivery
from service.auth import may_be_anonymous
from service.context import Context
from service.database import async_engine, async_sessions, database_url
from service.delivery import Delivery
from service.docs import ERROR_CONTENT, DescribedApp
from service.edge import Edge
from service.engine import VllmEngine, engine_connector
from service.errors import BadRequest, Conflict, DatabaseUnavailable, RatchetError
from service.fleet import Connect, Fleet
from service.journal import Journal
from service.keyring import KeyRing
from service.limits import Limits
from service.merged_delivery import MergedDelivery
from service.merged_engine import MergedEngine
from service.reconciler import Reconciler
from service.referee import Referee
from service.settings import Settings
from service.vote_count import VoteCount

log = logging.getLogger("ratchet")

ROUTERS = (
    chat.router,
    votes.router,
    rankings.router,
    labeling_queue.router,
    demonstrations.router,
    conversations.router,
    users.router,
    markdown.router,
    operator.router,
    operator_replicas.router,
    overview.router,
    activity.router,
    lineage.router,
    exports.router,
    imports.router,
    keys.router,
    pages.router,
    scrape.router,
)
ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "What to change.", "content": ERROR_CONTENT},
    "5XX": {
        "description": "Try again, after `Retry-After` seconds where it is given.",
        "content": ERROR_CONTENT,
    },
}
PLAINER = {
    400: (
        "invalid_json",
        "The body cannot be read: it must be JSON in UTF-8, not nested too deeply, with no endless numbers.",
    ),
    404: ("path_not_found", "There is nothing at this path. /docs lists what there is."),
    405: ("wrong_method", "This path does not take this method. The header Allow names those that it takes."),
}
"""What Starlette's and FastAPI's own errors mean, by status: code and message."""
ConnectBy = Callable[[aiohttp.ClientSession], Connect]


def connect_vllm(session: aiohttp.ClientSession) -> Connect:
    """How a vLLM replica is reached."""
    return lambda url: VllmEngine(url, session)


def connect_merged(session: aiohttp.ClientSession) -> Connect:
    """How one is reached that holds one policy at a time."""
    return lambda url: MergedEngine(url, session)


CONNECT_BY: dict[str, ConnectBy] = {"adapter": connect_vllm, "merged": connect_merged}
"""By `RATCHET_DELIVERY`."""


def create_app(settings: Settings, connect_by: ConnectBy | None = None) -> FastAPI:
    """The service. `connect_by` tells how an address becomes an engine: by HTTP, unless a test brings others."""
    connect_by = connect_by or CONNECT_BY[settings.delivery]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.state.context = await _start(stack, settings, connect_by)
            yield

    app = DescribedApp(lifespan=lifespan, key_optional=may_be_anonymous(settings))
    for router in ROUTERS:
        app.include_router(router, responses=ERROR_ANSWERS)
    app.include_router(docs.router)
    docs.mount_docs(app)
    pages.mount_files(app)
    app.add_middleware(Edge, answer=handle_error)
    for kind in (
        RatchetError,
        RequestValidationError,
        HTTPException,
        OperationalError,
        InterfaceError,
        IntegrityError,
    ):
        app.add_exception_handler(kind, handle_error)
    return app


async def _start(stack: AsyncExitStack, settings: Settings, connect_by: ConnectBy) -> Context:
    """Open what the service needs; `stack` closes it in the opposite order."""
    stack.push_async_callback(
        asyncio.to_thread, tracing.stop, tracing.start(settings.otlp_endpoint, "ratchet")
    )
    database: AsyncEngine = async_engine(settings)
    stack.push_async_callback(database.dispose)
    session = await stack.enter_async_context(
        aiohttp.ClientSession(connector=engine_connector(), cookie_jar=aiohttp.DummyCookieJar())
    )
    journal = Journal(database_url(settings))
    await stack.enter_async_context(journal.running())
    fleet = Fleet(connect_by(session), settings.replica_urls, exchanges_weights=settings.delivery == "merged")
    context = Context(
        settings=settings,
        sessions=async_sessions(database),
        journal=journal,
        fleet=fleet,
        keys=KeyRing(),
        limits=Limits(settings),
        votes=VoteCount(),
    )
    delivery: Delivery = (
        MergedDelivery(fleet, context.sessions, settings.duel_votes)
        if settings.delivery == "merged"
        else AdapterDelivery(fleet, context.sessions)
    )
    referee = Referee(context.sessions, settings)
    reconciler = Reconciler(settings, fleet, delivery, referee, context.sessions)
    task = asyncio.create_task(reconciler.run(), name="reconciler")
    stack.push_async_callback(_stop, task)
    return context


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def handle_error(request: Request, error: Exception) -> JSONResponse:
    """Every error, in OpenAI's shape."""
    shaped, status, headers = _shaped(error)
    if status == HTTPStatus.METHOD_NOT_ALLOWED and (methods := _methods(request)):
        headers["allow"] = ", ".join(sorted(methods))
    if request.method == "PUT" and request.url.path.endswith("/vote"):
        metrics.VOTES_REFUSED.labels(shaped.code or "invalid").inc()
    return JSONResponse(shaped.body(), status, headers)


def _methods(request: Request) -> set[str]:
    """What the path can be asked with. Starlette looks no further than the first route that has it."""
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    return {
        method
        for route in routes
        if route.matches(request.scope)[0] is Match.PARTIAL
        for method in route.methods
    }


def _shaped(error: Exception) -> tuple[RatchetError, int, dict[str, str]]:
    """The error that the caller sees, its status and headers. Unexpected ones say nothing of their cause."""
    if isinstance(error, RatchetError):
        return error, error.status, error.headers()
    if isinstance(error, RequestValidationError):
        return _validation_error(error), BadRequest.status, {}
    if isinstance(error, HTTPException) and isinstance(error.__cause__, RatchetError):
        return _shaped(error.__cause__)  # FastAPI wraps what is raised while it reads the body
    if isinstance(error, HTTPException):
        status = error.status_code
        code, message = PLAINER.get(status, (f"http_{status}", str(error.detail)))
        return BadRequest(message, code=code), status, dict(error.headers or {})
    if isinstance(error, OperationalError | InterfaceError):
        log.error("the database does not answer (DATABASE_URL)")
        return _shaped(DatabaseUnavailable("The database does not answer. Try again.", code="database"))
    if isinstance(error, IntegrityError):
        changed = "What this call works on was removed meanwhile. Look again, then try again."
        return _shaped(Conflict(changed, code="changed_meanwhile"))
    return RatchetError("Something went wrong. Try again."), RatchetError.status, {}


def _validation_error(error: RequestValidationError) -> BadRequest:
    """The first thing that is wrong, named by its path. Never shows the value: it may be private."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return BadRequest("The body is not JSON.", code="invalid_json")
    path = ".".join(str(part) for part in first["loc"][1:])
    message = first["msg"].removeprefix("Value error, ")
    return BadRequest(f"{path}: {message}" if path else f"The body: {message}", param=path or None)
