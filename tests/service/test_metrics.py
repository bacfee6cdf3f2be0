"""What `/metrics` tells: of calls, votes and replies as they happen, of cycles and duels as the database has them."""

import math
import re
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from service import metrics
from tests.service.conftest import Rows, Serve, ask, publish, wait_until
from tests.service.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
CLOSE = {"connection": "close"}
"""With what ends in a fault: the server hangs up then, and a client that has not seen it yet sends its next request in vain."""
README = Path(__file__).parents[2] / "deploy" / "README.md"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(client: httpx.Client) -> Samples:
    """All samples of `/metrics`."""
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    return {
        (each.name, frozenset(each.labels.items())): each.value
        for family in families
        for each in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


class Rise:
    """How much samples have risen since: the counters are this process's, and other tests count too."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._before = read(client)

    def of(self, name: str, **labels: str) -> float:
        return value(read(self._client), name, **labels) - value(self._before, name, **labels)


def test_every_metric_stands_in_the_readme_with_its_labels_and_meaning() -> None:
    text = README.read_text()
    ours = [metric for metric in vars(metrics).values() if hasattr(metric, "_labelnames")]
    assert len(ours) > 25
    for metric in ours:
        [family] = metric.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        assert f"| `{name}` | {labels} | {family.documentation} |" in text, name
        assert re.fullmatch(r"ratchet_[a-z_]+", name)
        assert len(metric._labelnames) <= 2


def test_nothing_else_is_ours() -> None:
    """The registry holds what `metrics.py` names, and the client library's own."""
    ours = {metric.describe()[0].name for metric in vars(metrics).values() if hasattr(metric, "_labelnames")}
    others = {family.name for family in REGISTRY.collect()} - ours
    assert not {name for name in others if not name.startswith(("python_", "process_"))}


@pytest.mark.database
def test_calls_count_by_route_and_status_and_unknown_paths_make_no_labels(serve: Serve) -> None:
    client = serve(FakeEngine())
    rise = Rise(client)
    client.post(CHAT, json=ask())
    client.post(CHAT, json=ask(temperature=3))
    for number in range(3):
        client.get(f"/v1/made-up-{number}")
        client.get(f"/v1/models/unknown-{number}")
    assert rise.of("ratchet_requests_total", route=CHAT, status="200") == 1
    assert rise.of("ratchet_requests_total", route=CHAT, status="400") == 1
    assert rise.of("ratchet_requests_total", route="none", status="404") == 3
    assert rise.of("ratchet_requests_total", route="/v1/models/{name}", status="404") == 3


@pytest.mark.database
def test_an_unexpected_fault_counts_as_500(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    rise = Rise(client)
    rows("ALTER TABLE deployment RENAME TO gone")
    assert client.get("/v1/status", headers=CLOSE).status_code == 500
    rows("ALTER TABLE gone RENAME TO deployment")
    assert rise.of("ratchet_requests_total", route="/v1/status", status="500") == 1


@pytest.mark.database
def test_votes_count_once_when_given_again_when_revised_and_by_reason_when_refused(serve: Serve) -> None:
    client = serve(FakeEngine(replies=("one two", "three four")))
    rise = Rise(client)
    comparison = client.post(CHAT, json=ask(comparison="always", user="ada")).json()["comparison"]["id"]
    vote = f"/v1/comparisons/{comparison}/vote"
    for choice in ("first", "first", "second"):
        assert client.put(vote, json={"choice": choice, "user": "ada"}).status_code == 200
    assert client.put(vote, json={"choice": "first", "user": "eve"}).status_code == 404
    assert client.put(vote, json={"choice": "fifth", "user": "ada"}).status_code == 400
    assert rise.of("ratchet_comparisons_total", reason="always") == 1
    assert rise.of("ratchet_votes_total", choice="first", change="given") == 1
    assert rise.of("ratchet_votes_total", choice="second", change="revised") == 1
    assert rise.of("ratchet_votes_refused_total", reason="comparison_not_found") == 1
    assert rise.of("ratchet_votes_refused_total", reason="invalid") == 1


@pytest.mark.database
@pytest.mark.parametrize("stream", [True, False])
def test_what_the_service_adds_leaves_out_what_the_engine_takes(serve: Serve, stream: bool) -> None:
    engine = FakeEngine(replies=("one two three",))
    client = serve(engine)
    client.post(CHAT, json=ask(stream=stream)).raise_for_status()  # the first one connects to the database
    engine.pause_seconds = 1.0
    rise = Rise(client)
    began = time.monotonic()
    client.post(CHAT, json=ask(stream=stream)).raise_for_status()
    took = time.monotonic() - began
    assert rise.of("ratchet_added_seconds_count") == 1
    assert rise.of("ratchet_added_seconds_sum") < took - 2.9
    assert rise.of("ratchet_reply_seconds_sum") > 2.9
    assert rise.of("ratchet_first_token_seconds_count") == stream
    if stream:
        assert 0.9 < rise.of("ratchet_first_token_seconds_sum") < took - 1.9


@pytest.mark.database
def test_the_policies_in_use_are_named_by_role(serve: Serve, rows: Rows, tmp_path: Path) -> None:
    client = serve(FakeEngine())
    assert value(read(client), "ratchet_policy_info", policy="policy-000000", role="live") == 1
    rise = Rise(client)
    publish(rows, "policy-000001", tmp_path / "nothing")
    wait_until(lambda: rise.of("ratchet_swaps_total", result="refused") == 1)  # its folder is not there
    rows("UPDATE deployment SET previous = 'policy-000001'")
    rows("NOTIFY deployment")
    wait_until(lambda: rise.of("ratchet_policy_info", policy="policy-000001", role="previous") == 1)
    assert value(read(client), "ratchet_policy_info", policy="policy-000001", role="challenger") == 0


CYCLE = """
INSERT INTO cycles (trigger, stage, metrics, created_at, ended_at) VALUES ('votes', %s, %s, now() - interval '1 hour', {ended})
"""


@pytest.mark.database
def test_the_newest_cycle_is_read_from_its_row(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    rows(CYCLE.format(ended="now() - interval '30 minutes'"), "failed", "{}")
    samples = read(client)
    assert value(samples, "ratchet_cycle_stage", stage="failed") == 1
    assert value(samples, "ratchet_cycle_seconds") == pytest.approx(1800, abs=60)
    assert math.isnan(value(samples, "ratchet_kl_nats"))
    measured = (
        '{"reward_model": {"accuracy": {"share": 0.75, "num_pairs": 40}},'
        ' "training": {"iterations": [{"kl": 0.5, "judge": 0.1}, {"kl": 1.25, "judge": 0.4}]}}'
    )
    rows(CYCLE.format(ended="NULL"), "training", measured)
    samples = read(client)
    assert value(samples, "ratchet_cycle_stage", stage="failed") == 0
    assert value(samples, "ratchet_cycle_stage", stage="training") == 1
    assert value(samples, "ratchet_cycle_seconds") == pytest.approx(3600, abs=60)
    assert value(samples, "ratchet_reward_model_accuracy") == 0.75
    assert value(samples, "ratchet_kl_nats") == 1.25
    assert value(samples, "ratchet_judge_score") == 0.4


@pytest.mark.database
def test_the_last_duel_of_each_kind_is_read_from_its_row(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    rows(
        "INSERT INTO policies (name, path, state, manifest) VALUES ('policy-000001', 'gone', 'rejected', '{}')"
    )
    duel = (
        "INSERT INTO duels (kind, challenger, incumbent, votes_per_user, metrics, outcome, ended_at)"
        " VALUES ('trial', 'policy-000001', 'policy-000000', 1, %s, 'worse', now())"
    )
    rows(duel, '{"wins": 1, "losses": 9, "ties": 2, "evidence_better": 0.1, "evidence_worse": 21.5}')
    samples = read(client)
    assert value(samples, "ratchet_duel_running", kind="trial") == 0
    votes = [
        value(samples, "ratchet_duel_votes", kind="trial", result=each) for each in ("win", "loss", "tie")
    ]
    assert votes == [1, 9, 2]
    assert value(samples, "ratchet_duel_evidence", kind="trial", that="worse") == 21.5


@pytest.mark.database
def test_without_the_database_the_rest_is_told(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    assert value(read(client), "ratchet_database_up") == 1
    rows("ALTER TABLE cycles RENAME TO gone")
    samples = read(client)
    assert value(samples, "ratchet_database_up") == 0
    assert value(samples, "ratchet_replica_healthy", replica="fake") == 1


@pytest.mark.database
def test_an_engines_own_metrics_are_handed_on_as_they_are(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    answer = client.get("/metrics/engines/0")
    assert answer.text == 'vllm:num_requests_running{engine="0"} 0.0\n'
    assert answer.headers["content-type"].startswith("text/plain")
    assert client.get("/metrics/engines/1").status_code == 404
    assert client.get("/metrics/engines/first").status_code == 400
    engine.alive = False
    assert client.get("/metrics/engines/0").status_code == 503
