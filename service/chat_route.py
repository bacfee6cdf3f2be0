"""How a chat request is read. Used by `chat.py`.

FastAPI finds an endpoint's parameters anew for each request: dependencies within dependencies, each with the address, headers and
cookies parsed. Of what a streamed answer costs the service that was an eighth. It still documents them, and says what is wrong with a
body that cannot be taken, which is read twice for it.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from service.auth import identity_of
from service.context import context_of
from service.schemas import ChatRequest


class ChatRoute(APIRoute):
    """Its endpoint takes a ChatRequest, the request, an Identity and the Context. A request that is right is read here."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's way to have it read otherwise. Raises TypeError for a dependency that nobody would ask."""
        if any(each.name is None for each in self.dependant.dependencies):  # of a router, or of the route
            raise TypeError(f"{self.path} is a ChatRoute: dependencies that are no parameters are not asked.")
        documented = super().get_route_handler()

        async def handle(request: Request) -> Response:
            body = await _read(request)
            if body is None:
                return await documented(request)
            identity = await identity_of(request)
            response: Response = await self.endpoint(body, request, identity, context_of(request))
            return response

        return handle


async def _read(request: Request) -> ChatRequest | None:
    """The body; None where it is not as it should be (pydantic's errors are ValueErrors). Raises TooLarge."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return None
    try:
        return ChatRequest.model_validate(await request.json())
    except (ValueError, RecursionError, ClientDisconnect):  # uvicorn says once more that the client has gone
        return None
