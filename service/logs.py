"""What is logged, and how: text for people, or one JSON object a line (`RATCHET_LOG_FORMAT=json`), with request and policy ids.

No message of a user is logged, in neither format. Faults are logged as where they happened and of what kind; what an exception says
of itself is left out, as libraries quote the value that they could not take.
"""

import json
import logging
import secrets
import traceback
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Format = Literal["text", "json"]
ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
OURS = {Path(__file__).parent, Path(__file__).parent.parent / "trainer"}
requests = logging.getLogger("ratchet.requests")


@dataclass(slots=True)
class RequestNote:
    """What lines that are logged for a request say of it."""

    id: str
    policies: tuple[str, ...] = ()
    """Those that answer it, once they are known."""


_request: ContextVar[RequestNote | None] = ContextVar("request", default=None)


def begin_request() -> RequestNote:
    """A new request: what is logged in its tasks from now on names it."""
    note = RequestNote("req-" + secrets.token_hex(8))
    _request.set(note)
    return note


def note_policies(policies: tuple[str, ...]) -> None:
    """What is logged of this request from now on names its policies."""
    if (note := _request.get()) is not None:
        note.policies = policies


def log_request(method: str, route: str, status: int, seconds: float) -> None:
    """One line for a request that has ended; only in JSON, where a program reads them."""
    if requests.isEnabledFor(logging.INFO):
        told = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
        requests.info("answered", extra={"told": told})


class TextFormatter(logging.Formatter):
    """For people."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatException(self, ei: ExcInfo) -> str:
        return "\n".join(f"  {line}" for line in _describe(ei))


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message; request, policies, error, and what a line tells besides, where there is any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        note = _request.get()
        if note is not None:
            line["request"] = note.id
            if note.policies:
                line["policies"] = list(dict.fromkeys(note.policies))
        line |= getattr(record, "told", {})
        if record.exc_info:
            line["error"] = _describe(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def start(log_format: Format) -> None:
    """Let this process log so, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    requests.setLevel(logging.INFO if log_format == "json" else logging.WARNING)


def _describe(error: ExcInfo) -> list[str]:
    """Where a fault passed through our code and where it happened, and of what kind it is: not what it says."""
    kind, _, where = error
    frames = traceback.extract_tb(where)
    told = [frame for frame in frames[:-1] if Path(frame.filename).parent in OURS] + frames[-1:]
    return [
        *(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in told),
        kind.__name__ if kind is not None else "unknown",
    ]


class LineWriter:
    """A file whose lines are logged: for a console in a process that logs JSON."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(name)
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._log.info("%s", line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Lines are logged as they end."""
