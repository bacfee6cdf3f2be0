"""The verified swap: what goes live, what is refused, and what is loaded again."""

from pathlib import Path

import pytest

from service.policies import BASE
from tests.adapters import write_policy
from tests.service.conftest import Rows, Serve, ask, publish, wait_until
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
POINTER = "SELECT live, previous, challenger FROM deployment"
CHAT = "/v1/chat/completions"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy whose probe expects -2 nats for each token, and -1 of the base."""
    return make_folder(tmp_path / "policy-000001")


def make_folder(path: Path) -> Path:
    probe = {
        "token_ids": [1, 2, 3],
        "logprobs": [None, -2.0, -2.0],
        "base_logprobs": [None, -1.0, -1.0],
    }
    return write_policy(path, probe=[probe])


@pytest.mark.parametrize(
    ("logprob", "base_logprob"),
    [
        (-2.05, -1.02),
        (-2.003, -1.0),
    ],  # the second rounds the base as the trainer does, and an adapter otherwise
)
def test_a_challenger_that_reproduces_its_probe_goes_live_and_can_be_rolled_back(
    serve: Serve, rows: Rows, folder: Path, logprob: float, base_logprob: float
) -> None:
    client = serve(FakeEngine(logprobs={folder.name: logprob, BASE: base_logprob}))
    publish(rows, folder.name, folder)
    wait_until(lambda: rows(POINTER) == [(folder.name, "policy-000000", None)])
    assert rows("SELECT state FROM policies WHERE name = %s", folder.name) == [("verified",)]
    wait_until(lambda: client.post(CHAT, json=ask()).headers.get("x-ratchet-policy") == folder.name)
    assert client.post(CHAT, json=ask() | {"model": "policy-000000"}).json()["model"] == "policy-000000"
    assert client.post("/operator/rollback").json()["live"] == "policy-000000"
    assert client.post(CHAT, json=ask()).headers["x-ratchet-policy"] == "policy-000000"


@pytest.mark.parametrize(
    ("logprob", "base_logprob", "reason"),
    [
        (-1.0, -1.0, "differ from the manifest's by 1.0000 nats a token (allowed: 0.0040)"),
        (float("nan"), -1.0, "log-probabilities differ"),
        (-2.01, -1.0, "by 0.0100 nats a token (allowed: 0.0040)"),
        (-2.06, -1.01, "by 0.0600 nats a token (allowed: 0.0400)"),  # an engine that computes less exactly
        (-2.11, -1.05, "by 0.1100 nats a token (allowed: 0.1000)"),  # never more than the manifest says
        (-2.0, -1.2, "the engine's base's log-probabilities differ"),
        (-2.0, float("nan"), "the engine's base's log-probabilities differ"),
    ],
)
def test_stale_or_broken_weights_are_refused_and_live_stays(
    serve: Serve, rows: Rows, folder: Path, logprob: float, base_logprob: float, reason: str
) -> None:
    engine = FakeEngine(logprobs={folder.name: logprob, BASE: base_logprob})
    client = serve(engine)
    publish(rows, folder.name, folder)
    wait_until(lambda: rows(POINTER) == [("policy-000000", None, None)])
    [(state, said)] = rows("SELECT state, reason FROM policies WHERE name = %s", folder.name)
    assert state == "refused"
    assert reason in said
    assert client.post(CHAT, json=ask() | {"model": folder.name}).status_code == 404
    wait_until(lambda: engine.held == {"policy-000000"})


def test_a_folder_without_ready_is_refused_before_it_is_loaded(
    serve: Serve, rows: Rows, folder: Path
) -> None:
    engine = FakeEngine()
    serve(engine)
    (folder / "READY").unlink()
    publish(rows, folder.name, folder)
    wait_until(lambda: rows("SELECT state FROM policies WHERE name = %s", folder.name) == [("refused",)])
    assert engine.held == {"policy-000000"}


def test_one_replica_that_cannot_load_it_refuses_it_for_all(serve: Serve, rows: Rows, folder: Path) -> None:
    good = FakeEngine(url="a", logprobs={folder.name: -2.0})
    serve(good, FakeEngine(url="b", cannot_load={folder.name}))
    publish(rows, folder.name, folder)
    wait_until(lambda: rows("SELECT state FROM policies WHERE name = %s", folder.name) == [("refused",)])


def test_a_replica_that_restarted_gets_its_policies_back_before_traffic(
    serve: Serve, rows: Rows, folder: Path
) -> None:
    engine = FakeEngine(logprobs={folder.name: -2.0})
    client = serve(engine)
    publish(rows, folder.name, folder)
    wait_until(lambda: client.post(CHAT, json=ask()).headers.get("x-ratchet-policy") == folder.name)
    engine.held = {"policy-000000"}  # as after a restart
    answer = client.post(CHAT, json=ask())
    assert answer.status_code == 503 or answer.headers["x-ratchet-policy"] == folder.name
    wait_until(lambda: client.post(CHAT, json=ask()).status_code == 200)
    assert folder.name in engine.held


def test_policies_that_nobody_wants_are_unloaded_but_the_trainers_own_stay(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    names = [f"policy-00000{number}" for number in (1, 2)]
    engine = FakeEngine(logprobs=dict.fromkeys(names, -2.0), held={"policy-000000", "rollout-3"})
    serve(engine)
    for name in names:
        publish(rows, name, make_folder(tmp_path / name))
        wait_until(lambda name=name: rows(POINTER)[0][0] == name)  # type: ignore[misc]
    assert engine.held == {"policy-000000", "rollout-3", *names}
    rows("UPDATE deployment SET previous = 'policy-000000'")
    wait_until(lambda: engine.held == {"policy-000000", "rollout-3", "policy-000002"})


def test_it_recovers_when_its_database_connection_is_cut(serve: Serve, rows: Rows, folder: Path) -> None:
    serve(FakeEngine(logprobs={folder.name: -2.0}))
    rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    publish(rows, folder.name, folder)
    wait_until(lambda: rows(POINTER)[0][0] == folder.name)
