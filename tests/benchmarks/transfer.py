"""Measures exports and imports: rows a second, the service's peak memory, and what another request waits meanwhile.

`make bench-transfer`. Starts a PostgreSQL and a service of its own.
"""

import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psycopg
import uvicorn
from sqlalchemy.orm import Session

from service import embedded, schema
from service.app import create_app
from service.database import database_url, sync_engine
from service.policies import ensure_base
from service.settings import Settings, get_settings
from tests.engine import free_port
from tests.service.fake_engine import FakeEngine

PROMPT_CHARACTERS, REPLY_CHARACTERS = 300, 700
USERS = 1000
REST_SECONDS = 5.0
RANKED = 10
"""One ranking of three replies for so many votes."""


def fill(connection: psycopg.Connection, num: int) -> None:
    """Votes on two replies each, and a tenth as many rankings of three."""
    words = "repeat(md5(n::text || %s), %s)"
    prompt = words % ("'p'", PROMPT_CHARACTERS // 32)
    connection.execute(f"INSERT INTO users (name) SELECT 'user ' || n FROM generate_series(1, {USERS}) AS n")
    connection.execute(
        f"INSERT INTO prompts (user_id, messages) SELECT 1 + n %% {USERS}, "
        f"jsonb_build_array(jsonb_build_object('role', 'user', 'content', {prompt})) "
        "FROM generate_series(1, %s::int) AS n",
        [num + num // RANKED],
    )
    sampling = json.dumps({"stop": [], "seed": None, "top_p": 1.0, "max_tokens": 512, "temperature": 1.0})
    for first, last, replies in ((1, num, 2), (num + 1, num + num // RANKED, 3)):
        connection.execute(
            "INSERT INTO replies (id, prompt_id, policy, sampling, content, finish_reason, prompt_tokens, "
            "completion_tokens, ended_at) SELECT 'chatcmpl-' || md5(n || '/' || p), n, 'policy-000000', %s, "
            f"{words % ('p::text', REPLY_CHARACTERS // 32)}, 'stop', 80, 170, now() "
            "FROM generate_series(%s::int, %s::int) AS n, generate_series(1, %s::int) AS p",
            [sampling, first, last, replies],
        )
        connection.execute(
            f"INSERT INTO comparisons (id, prompt_id, user_id, reason, propensity) "
            f"SELECT 'cmp-' || md5(n::text), n, 1 + n %% {USERS}, 'auto', 0.25 FROM generate_series(%s::int, %s::int) AS n",
            [first, last],
        )
        connection.execute(
            "INSERT INTO comparison_replies SELECT 'cmp-' || md5(n::text), p - 1, 'chatcmpl-' || md5(n || '/' || p) "
            "FROM generate_series(%s::int, %s::int) AS n, generate_series(1, %s::int) AS p",
            [first, last, replies],
        )
    connection.execute(
        "INSERT INTO votes (comparison_id, user_id, choice, tags) SELECT 'cmp-' || md5(n::text), "
        f"1 + n %% {USERS}, (ARRAY['first', 'second', 'tie', 'neither'])[1 + n %% 4], '[]' "
        "FROM generate_series(1, %s::int) AS n",
        [num],
    )
    connection.execute(
        "INSERT INTO rankings (comparison_id, user_id, ranks, tags) SELECT 'cmp-' || md5(n::text), "
        f"1 + n %% {USERS}, '[2, 1, 3]', '[]' FROM generate_series(%s::int, %s::int) AS n",
        [num + 1, num + num // RANKED],
    )
    connection.execute("ANALYZE")


@dataclass
class Waits:
    """How long a small request takes, asked all the time while something else runs."""

    port: int
    seconds: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        self.seconds.clear()
        ended = threading.Event()
        asking = threading.Thread(target=self._ask, args=[ended])
        asking.start()
        try:
            yield
        finally:
            ended.set()
            asking.join()

    def _ask(self, ended: threading.Event) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        while not ended.wait(0.02):
            began = time.perf_counter()
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            self.seconds.append(time.perf_counter() - began)

    def __str__(self) -> str:
        if len(self.seconds) < 100:
            return "too short to say"
        p50, p99 = (statistics.quantiles(self.seconds, n=100)[place] * 1000 for place in (49, 98))
        return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"


def peak_mib(pid: int) -> float:
    """The most memory that a process has held since `forget_peak`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    """Of all threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def export(port: int, path: str, file: IO[bytes]) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
        while chunk := answer.read(1 << 16):
            file.write(chunk)


def take(port: int, path: str, file: Path) -> int:
    """Import a file; how many rows were new."""
    with file.open("rb") as content:
        headers = {"content-length": str(file.stat().st_size)}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, headers, method="POST")
        with urllib.request.urlopen(request) as answer:
            return int(json.load(answer)["num_new"])


def measure(settings: Settings, pid: int, num: int) -> None:
    numbers = {"votes": num, "pairs": num // 2, "battles": num, "rankings": num // RANKED}
    table = Table(settings, pid)
    for kind, rows in numbers.items():
        for form in ("jsonl", "parquet"):
            file = settings.state / f"{kind}.{form}"
            with table.row(f"export {kind}, {form}", rows, file), file.open("wb") as out:
                export(settings.port, f"/operator/export/{kind}?format={form}", out)
    url = database_url(settings).set(drivername="postgresql").render_as_string(hide_password=False)
    for kind, rows in numbers.items():
        for form in ("jsonl", "parquet"):
            with psycopg.connect(url) as connection:
                connection.execute("TRUNCATE users, imports RESTART IDENTITY CASCADE")
            file = settings.state / f"{kind}.{form}"
            with table.row(f"import {kind}, {form}", rows, file):
                assert take(settings.port, f"/operator/import/{kind}?name=bench", file) == rows


class Table:
    """Prints a row for each thing that is measured, as it ends."""

    def __init__(self, settings: Settings, pid: int) -> None:
        self._pid = pid
        self._waits = Waits(settings.port)
        print("| what | MiB | s | rows/s | CPU of the service, us a row | peak RSS, MiB | another request |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        with self._waits.measured():
            time.sleep(REST_SECONDS)
        print(f"| at rest | | | | | {peak_mib(pid):.0f} | {self._waits} |")

    @contextlib.contextmanager
    def row(self, what: str, rows: int, file: Path) -> Iterator[None]:
        forget_peak(self._pid)
        began, cpu = time.perf_counter(), cpu_seconds(self._pid)
        with self._waits.measured():
            yield
        seconds, cpu = time.perf_counter() - began, cpu_seconds(self._pid) - cpu
        print(
            f"| {what} | {file.stat().st_size / (1 << 20):.0f} | {seconds:.1f} | {rows / seconds:,.0f} "
            f"| {cpu / rows * 1e6:.0f} | {peak_mib(self._pid):.0f} | {self._waits} |",
            flush=True,
        )


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[int]:
    """PostgreSQL and the service; gives the service's process id."""
    embedded.prepare(settings)
    with (settings.state / "postgres.log").open("ab") as log:
        server = subprocess.Popen(embedded.command(settings), stderr=log, cwd="/")
    try:
        embedded.wait_until_ready(settings, lambda: server.poll() is None)
        schema.upgrade(settings)
        with Session(sync_engine(settings)) as session:
            ensure_base(session, "base")
            session.commit()
        environment = os.environ | {
            "RATCHET_STATE": str(settings.state),
            "RATCHET_DATABASE_PORT": str(settings.database_port),
            "RATCHET_PORT": str(settings.port),
        }
        service = subprocess.Popen([sys.executable, "-m", __spec__.name, "--serve"], env=environment)
        try:
            wait_for(settings.port)
            yield service.pid
        finally:
            service.terminate()
            service.wait()
    finally:
        embedded.end_leftovers(embedded.data_folder(settings))
        server.wait()


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz"):
            return
        time.sleep(0.1)
    raise TimeoutError("the service did not start")


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        settings = get_settings()
        app = create_app(settings, lambda _: lambda url: FakeEngine(url=url))
        uvicorn.run(app, port=settings.port, log_level="warning")
        return
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(state=Path(folder), port=free_port(), database_port=free_port())
        with running(settings) as pid:
            url = database_url(settings).set(drivername="postgresql").render_as_string(hide_password=False)
            with psycopg.connect(url) as connection:
                fill(connection, num)
            print(f"{num:,} votes")
            measure(settings, pid, num)


if __name__ == "__main__":
    main()
