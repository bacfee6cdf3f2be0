"""A client that runs in a process of its own: in another environment, or another language.

It is told one call a line, as JSON, and answers with an event a line: `{"piece": ...}` for each piece of a stream as it
arrives, then `{"done": ...}` with what it saw, or `{"error": ...}` with what it raised. Used by the tests here;
`replying.py` and `node/client.mjs` are the other side.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers" / "bin"
HERE = Path(__file__).parent


class Peer:
    """The near end of such a client."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process = process
        self._log = log

    def events(self, call: str, service: httpx.Client, **fields: object) -> Iterator[dict[str, Any]]:
        """Have it make one call of the service; gives each event at the moment at which it comes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        told = {"call": call, "base_url": f"{str(service.base_url).rstrip('/')}/v1", **fields}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            yield event
            if "piece" not in event:
                return
        raise AssertionError(f"the client ended:\n{self._log.read_text()[-4000:]}")

    def done(self, call: str, service: httpx.Client, **fields: object) -> Any:
        """What it saw in the end."""
        *_, last = self.events(call, service, **fields)
        assert "done" in last, f"{last}\n{self._log.read_text()[-4000:]}"
        return last["done"]

    def error(self, call: str, service: httpx.Client, **fields: object) -> dict[str, Any]:
        """What it raised in the end."""
        *_, last = self.events(call, service, **fields)
        assert "error" in last, f"it raised nothing: {last}"
        error: dict[str, Any] = last["error"]
        return error


@contextmanager
def running_peer(
    words: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Peer]:
    """Start one; it ends when its input does."""
    with (
        log.open("w") as output,
        subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=environment,
            text=True,
        ) as process,
    ):
        try:
            yield Peer(process, log)
        finally:
            process.kill()
