"""Answers that end early when the client goes away. Plain ASGI: `BaseHTTPMiddleware` hides disconnects."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

CLIENT_CLOSED = 499
"""nginx's status for a client that did not wait; nobody receives it."""
SLOW_SECONDS = 5.0


async def until_gone(receive: Receive, work: Coroutine[None, None, Response]) -> Response:
    """The work's response; it is cancelled if the client goes first. Call once the body has been read."""
    async with _while_there(receive):
        return await work
    return Response(status_code=CLIENT_CLOSED)


@asynccontextmanager
async def _while_there(receive: Receive) -> AsyncIterator[None]:
    """Cancel the body, and nothing else, when the client goes."""
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    inside, left = True, False

    def leave(gone: asyncio.Task[None]) -> None:
        nonlocal left
        if inside and not gone.cancelled():
            left = True
            task.cancel()

    gone = asyncio.create_task(_disconnect(receive))
    gone.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if not left or task.cancelling() > before + 1:  # somebody else wants an end
            raise
    finally:
        inside = False
        gone.cancel()
        if left:
            task.uncancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, each written at once. The generator is closed as soon as the client goes away.

    `deadline`, by the loop's clock: the generator keeps to it by itself; a client that does not read is cut off
    `SLOW_SECONDS` after.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str], deadline: float) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self._deadline = deadline
        self.init_headers(headers | {"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(TimeoutError):
            async with _while_there(receive):
                await self._send_all(send)

    async def _send_all(self, send: Send) -> None:
        async with asyncio.timeout_at(self._deadline + SLOW_SECONDS), aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
