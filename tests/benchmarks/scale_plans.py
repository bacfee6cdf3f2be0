"""Makes every call of the API on the large database, and finds statements that read too much of it. Used by `scale.py`.

`scale_service.py` explains each statement where it runs. What no plan shows, PostgreSQL's own counters do: foreign keys are
checked by statements of its own, and a statement that was prepared may be planned once for all values.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg

from service.settings import Settings
from tests.benchmarks.durability_parts import libpq_url

LARGE_ROWS = 10_000
"""A table with so many is large."""
MOST_READ = 5_000
"""Rows of a large table that one step of a plan may read."""
ELSEWHERE = ("/operator/export", "/operator/import")
"""Calls that read or write everything, by design."""
HEAVY = "user-1"
"""The user who said most."""
ACCEPTED = (
    "SELECT count(*) AS count_1 FROM votes",
    "SELECT count(DISTINCT votes.user_id) AS count_1 FROM votes WHERE votes.created_at > now() - make_interval("
    "%(make_interval_1)s::INTEGER, %(make_interval_2)s::INTEGER, %(make_interval_3)s::INTEGER, %(make_interval_4)s::INTEGER)",
)
"""Read a large table by design: the first is remembered (`service/vote_count.py`), the second asked once a duel."""
QUESTION = [{"role": "user", "content": "And a lime?"}]
Plan = dict[str, Any]


def scans(conninfo: str, before: dict[str, int] | None = None) -> dict[str, int]:
    """Rows that scans from end to end have read of each large table, since `before`; ask when others have hung up."""
    query = (
        "SELECT s.relname, seq_tup_read FROM pg_stat_user_tables AS s JOIN pg_class AS c ON c.oid = s.relid"
        " WHERE reltuples >= %s"
    )
    with psycopg.connect(conninfo) as connection:
        now = dict(connection.execute(query, [LARGE_ROWS]).fetchall())
    return now if before is None else {name: n - before[name] for name, n in now.items() if n > before[name]}


def call_everything(settings: Settings) -> list[str]:
    """Make each call of the API at least once; those that were left out."""
    with httpx.Client(base_url=f"http://127.0.0.1:{settings.port}", timeout=120) as client:
        walk = Walk(client, settings)
        walk.chat_and_vote()
        walk.rank()
        walk.demonstrate()
        walk.converse()
        walk.operate()
        walk.look_around()
        walk.remove()
        return walk.left_out()


class Walk:
    """One pass over all calls. Each must succeed."""

    def __init__(self, client: httpx.Client, settings: Settings) -> None:
        self._client = client
        self._made: set[tuple[str, str]] = set()
        self._conninfo = libpq_url(settings)
        with psycopg.connect(libpq_url(settings)) as connection:
            row = connection.execute("SELECT name FROM users ORDER BY id DESC LIMIT 2").fetchall()
            self._light, self._removed = row[0][0], row[1][0]
            connection.execute("UPDATE deployment SET previous = live")

    def _call(self, method: str, path: str, **options: Any) -> Any:
        answer = self._client.request(method, path, **options)
        if not answer.is_success:
            raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        self._made.add((method, path))
        return answer.json() if answer.headers.get("content-type") == "application/json" else answer.text

    def _chat(self, **fields: Any) -> Any:
        return self._call("POST", "/v1/chat/completions", json={"messages": QUESTION, **fields})

    def chat_and_vote(self) -> None:
        for user in (HEAVY, self._light, "somebody-new"):
            for stream in (False, True):
                self._chat(comparison="auto", user=user, stream=stream)
            path = f"/v1/comparisons/{self._chat(comparison='always', user=user)['comparison']['id']}/vote"
            for choice in ("first", "second", "second"):
                headers = {"idempotency-key": f"{path} {choice}"}
                self._call("PUT", path, json={"choice": choice, "user": user}, headers=headers)
            self._call("GET", path.replace("/v1/", "/operator/").replace("/vote", "/lineage"))
            for method, end in (("GET", ""), ("GET", "/history"), ("DELETE", "")):
                self._call(method, path + end, params={"user": user})
        self._call("GET", f"/operator/replies/{self._chat()['id']}/lineage")

    def rank(self) -> None:
        body = {"messages": QUESTION, "count": 4, "user": HEAVY}
        path = f"/v1/comparisons/{self._call('POST', '/v1/comparisons', json=body)['id']}/ranking"
        headers = {"idempotency-key": path}
        self._call("PUT", path, json={"ranks": [1, 2, 3, 4], "user": HEAVY}, headers=headers)
        for method, end in (("GET", ""), ("GET", "/history"), ("DELETE", "")):
            self._call(method, path + end, params={"user": HEAVY})
        self._call("GET", "/v1/comparisons/queue")

    def demonstrate(self) -> None:
        reply = self._chat(user=HEAVY)["choices"][0]["reply_id"]
        path = "/v1/demonstrations"
        for what in ({"messages": QUESTION}, {"corrects": reply}):
            made = self._call("POST", path, json={**what, "content": "A lime is green.", "user": HEAVY})
            page = self._call("GET", path, params={"user": HEAVY})["data"]
            self._call("GET", path, params={"user": HEAVY, "before": page[-1]["id"]})
            self._call("DELETE", f"{path}/{made['id']}", params={"user": HEAVY})

    def converse(self) -> None:
        path = "/v1/conversations"
        for user in (HEAVY, self._light):
            made = self._call("POST", path, json={"user": user})["id"]
            for _ in range(3):
                reply = self._chat(conversation=made, user=user)["choices"][0]["reply_id"]
            self._chat(conversation=made, user=user, follows=reply)
            self._call("GET", f"{path}/{made}", params={"user": user})
            page = self._call("GET", path, params={"user": user})["data"]
            self._call("GET", path, params={"user": user, "before": page[-1]["id"], "limit": 100})
            self._call("DELETE", f"{path}/{made}", params={"user": user})

    def operate(self) -> None:
        for move in ("promote", "reject"):
            with psycopg.connect(self._conninfo) as connection:  # any verified policy can be on trial
                connection.execute("UPDATE deployment SET challenger = live")
            self._call("POST", f"/operator/{move}")
        for state in ("serving", "removed"):
            self._call("PUT", "/operator/replicas", json={"url": "http://127.0.0.1:9", "state": state})
        for path in (
            "policies", "deployment", "cycles", "duels", "ratings", "actions", "replicas", "overview", "samples", "votes",
        ):  # fmt: skip
            self._call("GET", f"/operator/{path}")
        self._call("GET", "/operator/votes", params={"commented": "true", "limit": 100})
        for hours in (24, 168):
            self._call("GET", "/operator/votes/hours", params={"hours": hours})
        self._call("GET", f"/operator/duels/{self._call('GET', '/operator/duels')[0]['id']}/course")
        self._call("GET", f"/operator/cycles/{self._call('POST', '/operator/cycles')['id']}")
        self._call("POST", "/operator/rollback")
        key = self._call("POST", "/operator/keys", json={"account": "acme", "role": "user"})
        self._call("GET", "/v1/users/me", headers={"authorization": f"Bearer {key['key']}"})
        self._call("GET", "/operator/keys")
        self._call("DELETE", f"/operator/keys/{key['id']}")

    def look_around(self) -> None:
        self._call("POST", "/v1/markdown", json={"texts": ["A lemon is **yellow**."]})
        for path in ("/healthz", "/readyz", "/v1/models", "/v1/models/ratchet", "/v1/status"):
            self._call("GET", path)
        for path in ("/metrics", "/metrics/engines/0"):
            self._call("GET", path)
        self._call("GET", "/v1/users/me", params={"user": HEAVY})
        self._call("PATCH", "/v1/users/me", params={"user": HEAVY}, json={"compares": True})

    def remove(self) -> None:
        self._call("DELETE", "/v1/users/me", params={"user": self._removed})
        self._call("DELETE", "/operator/users", params={"user": "somebody-new"})

    def left_out(self) -> list[str]:
        """Calls of the API that were not made."""
        paths = self._client.get("/openapi.json").json()["paths"]
        known = [
            (m.upper(), path)
            for path, calls in paths.items()
            if not path.startswith(ELSEWHERE)
            for m in calls
        ]
        return [f"not called: {method} {path}" for method, path in known if not self._was_made(method, path)]

    def _was_made(self, method: str, template: str) -> bool:
        pattern = re.compile(re.sub(r"\{\w+\}", "[^/]+", template))
        return any(made == method and pattern.fullmatch(path) for made, path in self._made)


@dataclass(slots=True)
class Statement:
    """One that the service makes, and the worst of its plans."""

    text: str
    calls: set[str] = field(default_factory=set)
    times: int = 0
    slowest_ms: float = 0.0
    most_read: int = 0
    """Rows of a large table that one step read."""
    steps: set[str] = field(default_factory=set)
    """How it gets at large tables."""
    faults: set[str] = field(default_factory=set)

    def add(self, call: str, plan: Plan, large: set[str]) -> None:
        """One more plan."""
        self.calls.add(call)
        self.times += 1
        self.slowest_ms = max(self.slowest_ms, plan["Execution Time"])
        for step in _steps(plan["Plan"]):
            table, kind = step.get("Relation Name"), step["Node Type"]
            if table in large and kind.endswith("Scan"):
                self._add_step(kind, table, step)

    def _add_step(self, kind: str, table: str, step: Plan) -> None:
        read = step["Actual Rows"] + step.get("Rows Removed by Filter", 0)
        read = round(read * step["Actual Loops"])
        self.steps.add(f"{kind} on {table}")
        self.most_read = max(self.most_read, read)
        if kind == "Seq Scan" or read > MOST_READ:
            self.faults.add(f"{kind} on {table} reads {read:,} rows")


def _steps(plan: Plan) -> Iterator[Plan]:
    yield plan
    for below in plan.get("Plans", []):
        yield from _steps(below)


def read_statements(plans: Path, conninfo: str) -> list[Statement]:
    """Every statement that was explained, the slowest first."""
    with psycopg.connect(conninfo) as connection:
        query = "SELECT relname FROM pg_class WHERE relkind = 'r' AND reltuples >= %s"
        large = {name for (name,) in connection.execute(query, [LARGE_ROWS])}
    found: dict[str, Statement] = {}
    for line in plans.read_text().splitlines():
        row = json.loads(line)
        text = " ".join(row["statement"].split())
        found.setdefault(text, Statement(text)).add(_without_ids(row["call"]), row["plan"], large)
    for text in ACCEPTED:
        found.get(text, Statement(text)).faults.clear()
    return sorted(found.values(), key=lambda statement: -statement.slowest_ms)


def _without_ids(call: str) -> str:
    return re.sub(r"/(cmp|conv|dem|policy)-\w+|/\d+", "/...", call)
