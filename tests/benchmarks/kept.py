"""Results of a benchmark of hours, kept one by one as they come: what was cut off can go on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
Key = Sequence[str | int | float]


class Kept:
    """A file of one JSON object per line: `key` and `result`."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """resume: whether to go on with what the file has; else it is begun anew."""
        self._path = path
        self._results: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        elif path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # the last one may have been cut off
                    entry = json.loads(line)
                    self._results[_name(entry["key"])] = entry["result"]
            path.write_text("".join(_line(json.loads(key), result) for key, result in self._results.items()))

    def get(self, key: Key, kind: type[T], work: Callable[[], T]) -> T:
        """The result of this key: what was kept, or what `work` gives, which then is kept. `kind`: a dataclass or a list of one."""
        name = _name(key)
        if name not in self._results:
            self._results[name] = msgspec.to_builtins(work())
            with self._path.open("a") as file:
                file.write(_line(key, self._results[name]))
        return msgspec.convert(self._results[name], kind)


def _name(key: Key) -> str:
    return json.dumps(list(key))


def _line(key: Key, result: Any) -> str:
    return json.dumps({"key": list(key), "result": result}) + "\n"
