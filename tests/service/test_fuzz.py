"""The API answers whatever the world sends it as its document says. `make fuzz`: 10,000 cases without keys, and with."""

import os

import httpx
import pytest

from tests.service.conftest import Rows, Serve
from tests.service.fake_engine import FakeEngine
from tests.service.fuzzing import Report, fuzz, take_files
from tests.service.transfer import KINDS, download, give_feedback

pytestmark = pytest.mark.database
CASES = int(os.environ.get("FUZZ_CASES", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
MOST_SUCCEED_FROM = 10_000
"""With so many cases, nine in ten of the calls are made rightly at least once."""
CANNOT_SUCCEED = {"POST /operator/rollback", "POST /operator/promote", "POST /operator/reject"}
"""Nothing was ever swapped, and there is no challenger."""


def check(report: Report, name: str) -> None:
    print(f"\nfuzzed {name}, seed {SEED}: {report.summary()}")
    for failure, how in report.failures.items():
        print(f"\n{failure}\n{how}")
    assert report.failures == {}
    assert report.cases >= CASES
    assert not any(status >= 500 for _, status in report.answers)
    refused = report.operations() - report.succeeded() - CANNOT_SUCCEED
    print(f"never answered 2xx: {', '.join(sorted(refused)) or 'none'}")
    if CASES >= MOST_SUCCEED_FROM:
        assert len(refused) <= len(report.operations()) / 10


def prepare(client: httpx.Client, engine: FakeEngine, rows: Rows) -> None:
    """Feedback of every kind, its exports to make imports of, and a cycle and a duel that are over, with their policy."""
    give_feedback(client, engine)
    take_files([download(client, kind, format=format) for kind in KINDS for format in ("jsonl", "parquet")])
    rows(
        "INSERT INTO policies (name, path, state, manifest) VALUES ('policy-000001', 'p', 'verified', '{\"a\": 1}')"
    )
    rows(
        "INSERT INTO duels (kind, challenger, incumbent, votes_per_user, outcome, ended_at)"
        " VALUES ('trial', 'policy-000001', 'policy-000000', 1, 'undecided', now())"
    )
    rows(
        "INSERT INTO cycles (trigger, stage, policy, ended_at) VALUES ('votes', 'promoted', 'policy-000001', now())"
    )


def test_without_keys(serve: Serve, rows: Rows) -> None:
    client = serve(engine := FakeEngine(), everywhere=True)  # also where fuzzing adds a replica
    prepare(client, engine, rows)
    report = fuzz(str(client.base_url), cases=CASES, seed=SEED)
    check(report, "without keys")


def test_with_a_key_of_each_role(serve: Serve, rows: Rows) -> None:
    client = serve(engine := FakeEngine())
    prepare(client, engine, rows)
    roles = ("user", "labeler", "operator")
    made = [client.post("/operator/keys", json={"account": role, "role": role}).json() for role in roles]
    client = serve(FakeEngine(), everywhere=True, require_keys=True, requests_per_minute=1_000_000_000)
    report = Report()
    for key in made:
        report += fuzz(
            str(client.base_url),
            cases=-(-CASES // len(roles)),
            seed=SEED,
            key=key["key"],
            spared=frozenset(key["id"] for key in made),
        )
    check(report, "with keys")
    for key in made:
        assert (
            client.get("/v1/users/me", headers={"authorization": f"Bearer {key['key']}"}).status_code == 200
        )
