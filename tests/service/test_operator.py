"""The operator's API."""

import pytest

from tests.service.conftest import Rows, Serve
from tests.service.fake_engine import FakeEngine


@pytest.mark.database
def test_a_cycle_is_asked_for_once_and_can_be_watched(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    asked = client.post("/operator/cycles")
    assert (asked.status_code, asked.json()["trigger"], asked.json()["stage"]) == (
        201,
        "operator",
        "requested",
    )
    assert client.post("/operator/cycles").status_code == 409
    assert client.get("/v1/status").json() | {"live": ""} == {
        "live": "",
        "votes": 0,
        "cycles": 1,
        "cycle_stage": "requested",
    }
    rows("UPDATE cycles SET stage = 'rejected', ended_at = now()")
    assert client.get(f"/operator/cycles/{asked.json()['id']}").json()["stage"] == "rejected"
    assert client.post("/operator/cycles").status_code == 201
    assert len(client.get("/operator/cycles").json()) == 2
    assert client.get("/operator/cycles/99").status_code == 404


@pytest.mark.database
def test_a_cycle_is_asked_for_by_its_method(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    asked = client.post("/operator/cycles", json={"method": "sft", "reason": "A manual was written."})
    assert asked.json()["metrics"] == {"method": "sft"}
    assert client.get("/operator/actions").json()[0]["reason"] == "A manual was written."


@pytest.mark.database
def test_there_is_nothing_to_roll_back_to_at_first(serve: Serve) -> None:
    client = serve(FakeEngine())
    assert client.post("/operator/rollback").json()["error"]["code"] == "no_previous_policy"
    assert client.get("/operator/deployment").json()["live"] == "policy-000000"
    assert [policy["name"] for policy in client.get("/operator/policies").json()] == ["policy-000000"]
