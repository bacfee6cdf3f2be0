"""Downloads every export and watches how much memory the service takes meanwhile. Used by `scale.py`."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pyarrow.parquet

from service.settings import Settings

PATH = "/operator/export/{kind}"
KINDS = ("votes", "pairs", "battles", "rankings", "demonstrations")
FORMATS = ("jsonl", "parquet")
MOST_GROWTH_MIB = 256
"""Bound of what an export may add to the service's memory, however much it exports."""
CHUNK_BYTES = 1 << 18


async def measure_exports(settings: Settings, pid: int) -> list[dict[str, Any]]:
    """A row for each kind and format; none where this service has no exports."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{settings.port}", timeout=timeout) as http:
        async with http.get("/openapi.json") as response:
            if PATH not in (await response.json())["paths"]:
                return []
        asked = [(kind, format) for kind in KINDS for format in FORMATS]
        return [
            await _export(http, settings.state / f"{kind}.{format}", kind, format, pid)
            for kind, format in asked
        ]


async def _export(
    http: aiohttp.ClientSession, file: Path, kind: str, format: str, pid: int
) -> dict[str, Any]:
    _forget_peak(pid)
    before = _memory_mib(pid, "VmRSS")
    began = time.monotonic()
    async with http.get(PATH.format(kind=kind), params={"format": format}) as response:
        response.raise_for_status()
        await _save(response.content.iter_chunked(CHUNK_BYTES), file)
    seconds = time.monotonic() - began
    rows, num_bytes = _num_rows(file), file.stat().st_size
    file.unlink()
    return {
        "export": f"{kind} {format}",
        "rows": rows,
        "MB": round(num_bytes / 1e6, 1),
        "seconds": round(seconds, 1),
        "rows/s": round(rows / seconds),
        "MiB before": before,
        "peak MiB": _memory_mib(pid, "VmHWM"),
    }


async def _save(chunks: AsyncIterator[bytes], path: Path) -> None:
    with path.open("wb") as file:
        async for chunk in chunks:
            file.write(chunk)


def _num_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        return int(pyarrow.parquet.read_metadata(file).num_rows)
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _forget_peak(pid: int) -> None:
    """Have the kernel count the peak from now on (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _memory_mib(pid: int, name: str) -> int:
    """`VmRSS` is the memory in use, `VmHWM` its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) // 1024
