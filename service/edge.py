"""What every request passes before it reaches a route: an id, a size, a rate by address, a deadline. Plain ASGI.

And what is told of it when it has ended: a count, in JSON logs a line, with tracing a span.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs, metrics, tracing
from service.auth import is_loopback
from service.context import Context
from service.errors import DeadlineExceeded, RatchetError, TooLarge
from service.streaming import CLIENT_CLOSED

log = logging.getLogger("ratchet.edge")
MOST_BODY_BYTES = 1 << 20
UNHURRIED = ("/operator/export", "/operator/import")
"""Take as long, and carry as much, as they need."""
OWN_DEADLINE = ("/v1/chat/completions", "/v1/comparisons")
"""Those that generate keep to a deadline of their own; beneath them, votes do not: see `_has_deadline`."""
REQUEST_ID = b"x-request-id"
NOT_ROUTED = "none"
"""The route of paths that there are not (and of the page's files), so that nobody can make up labels."""


class Edge:
    """The outermost layer of ours."""

    def __init__(self, app: ASGIApp, answer: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = logs.begin_request()
        status = 0
        began = time.monotonic()

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID, request.id.encode())]
            await send(message)

        with tracing.serving(scope, request) as span:
            try:
                await self._pass_on(scope, receive, identified)
            except Exception as error:
                if not isinstance(error, RatchetError):
                    log.exception("a request ended in an unexpected error")
                if not status:
                    response = await self._answer(Request(scope), error)
                    await response(scope, receive, identified)
                elif not isinstance(error, RatchetError):
                    raise  # what was begun must not look whole
            finally:
                status = status or CLIENT_CLOSED  # nothing was answered, as nobody waits
                route = getattr(scope.get("route"), "path", NOT_ROUTED)
                metrics.REQUESTS.labels(route, status).inc()
                logs.log_request(scope["method"], route, status, time.monotonic() - began)
                tracing.end_serving(span, scope["method"], route, status)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        context: Context = scope["app"].state.context
        _count(scope, context)
        if not scope["path"].startswith(UNHURRIED):
            receive = _limited(receive)
        seconds = context.settings.call_deadline_seconds if _has_deadline(scope["path"]) else None
        try:
            async with asyncio.timeout(seconds) as deadline:
                await self._app(scope, receive, send)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(f"This call took longer than {seconds:g} s. Try again.") from None


def _has_deadline(path: str) -> bool:
    return path not in OWN_DEADLINE and not path.startswith(UNHURRIED)


def _count(scope: Scope, context: Context) -> None:
    """Raises TooManyRequests. This machine itself is not counted: it is us, our tests, and its owner."""
    client = scope.get("client")
    if client is not None and not is_loopback(client[0]):
        context.limits.count_address(client[0])


def _limited(receive: Receive) -> Receive:
    """A body of at most 1 MiB. Raises TooLarge as soon as it is more."""
    num_bytes = 0

    async def counted() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MOST_BODY_BYTES:
            raise TooLarge(
                f"The body is larger than {MOST_BODY_BYTES} bytes. Shorten the conversation.",
                code="body_too_large",
            )
        return message

    return counted
