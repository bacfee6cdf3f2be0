"""The far end of `peer.py` for clients in Python: reads calls, makes them, reports. Runs in .venv-peers."""

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

REPORTS = os.fdopen(os.dup(1), "w")
"""Where the near end listens. What a library prints goes to the log instead."""
os.dup2(2, 1)


def piece(text: str) -> None:
    """Report a piece of a stream, now."""
    _report({"piece": text})


def reply(calls: dict[str, Callable[..., Any]]) -> None:
    """Make each call that comes, until the input ends."""
    asyncio.run(_reply(calls))


async def _reply(calls: dict[str, Callable[..., Any]]) -> None:
    """The loop goes on between calls, as an application's does: clients end what was left open in it."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        fields = json.loads(line)
        call = calls[fields.pop("call")]
        try:
            awaited = inspect.iscoroutinefunction(call)
            done = await call(**fields) if awaited else await asyncio.to_thread(call, **fields)
        except Exception as error:
            _report({"error": _described(error)})
        else:
            _report({"done": done})


def _described(error: Exception) -> dict[str, Any]:
    return {
        "classes": [kind.__name__ for kind in type(error).__mro__],
        "status": getattr(error, "status_code", None),
        "code": getattr(error, "code", None),
        "message": str(error),
    }


def _report(event: dict[str, Any]) -> None:
    print(json.dumps(event, default=str), file=REPORTS, flush=True)
