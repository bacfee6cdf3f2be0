"""The service with an engine that answers at once, so that what is measured is the service and its database.

    python -m tests.benchmarks.scale_service [PLANS]

With PLANS, a file, every statement that the service sends is first run by EXPLAIN (ANALYZE) where it is about to run: on the
same connection, in the same transaction, with the same values, and undone. Each is a line of JSON in that file. The settings
come from the environment, as the service's do. Started by `scale.py`.
"""

import json
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psycopg
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from service.__main__ import listen
from service.app import create_app
from service.settings import get_settings
from tests.service.fake_engine import FakeEngine

EXPLAINED = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")
CALL: ContextVar[str] = ContextVar("CALL", default="beside requests")
"""The call that is being answered. What the journal and the reconciler ask belongs to none."""


class Named:
    """Notes which call is being answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            CALL.set(f"{scope['method']} {scope['path']}")
        await self._app(scope, receive, send)


def explain_into(path: Path) -> None:
    """Have psycopg explain each statement before it runs it."""
    run = psycopg.AsyncCursor.execute
    declare = psycopg.AsyncServerCursor.execute
    file = path.open("a", buffering=1)

    async def explain(connection: psycopg.AsyncConnection, query: Any, params: Any) -> None:
        text = query.decode() if isinstance(query, bytes) else query
        if not isinstance(text, str) or not text.strip().upper().startswith(EXPLAINED):
            return
        async with connection.transaction(force_rollback=True), psycopg.AsyncCursor(connection) as cursor:
            await run(cursor, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {text}".encode(), params)
            row = await cursor.fetchone()
        plan = row[0][0] if row else {}
        file.write(json.dumps({"call": CALL.get(), "statement": text, "plan": plan}) + "\n")

    async def execute(self: Any, query: Any, params: Any = None, **options: Any) -> Any:
        await explain(self.connection, query, params)
        return await run(self, query, params, **options)

    async def execute_declared(self: Any, query: Any, params: Any = None, **options: Any) -> Any:
        await explain(self.connection, query, params)
        return await declare(self, query, params, **options)

    psycopg.AsyncCursor.execute = execute  # type: ignore[method-assign]
    psycopg.AsyncServerCursor.execute = execute_declared  # type: ignore[method-assign]


def main() -> None:
    """Serve until told to stop."""
    settings = get_settings()
    if len(sys.argv) > 1:
        explain_into(Path(sys.argv[1]))
    app = create_app(settings, lambda _: lambda url: FakeEngine(url=url))
    app.add_middleware(Named)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[listen(settings)])


if __name__ == "__main__":
    main()
