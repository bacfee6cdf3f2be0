"""The dashboards and alerts ask for nothing that is not there: each name is held against real `/metrics`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.conftest import DEPLOY, Tool
from tests.service.conftest import Serve, ask

DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
NOT_NAMES = re.compile(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|\b(by|without|on|ignoring)\s*\([^)]*\)')
NAME = re.compile(r"[A-Za-z_:][\w:]*(?!\w*\s*\()")
WORDS = {"and", "or", "unless", "on"}
BY_PROMETHEUS = {"up"}


def boards() -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in DASHBOARDS}


def expressions() -> Iterator[str]:
    """Of all panels and alerts."""
    for board in boards().values():
        for panel in board["panels"]:
            yield from (target["expr"] for target in panel["targets"])
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def names(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    return set(NAME.findall(NOT_NAMES.sub(" ", expression))) - WORDS


def test_names_are_found_in_expressions() -> None:
    expression = (
        'histogram_quantile(0.9, sum by (job, le) (rate(a_bucket{b="c"}[5m]))) > 5 and vllm:d == 6 * e'
    )
    assert names(expression) == {"a_bucket", "vllm:d", "e"}


def test_every_expression_can_be_read(promtool: Tool, tmp_path: Path) -> None:
    """As rules that record it, since that is what promtool reads."""
    rules = [
        {"record": f"test:{number}", "expr": expression} for number, expression in enumerate(expressions())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "--lint=none", str(file))


@pytest.mark.engine
@pytest.mark.database
def test_every_name_is_one_that_the_service_or_vllm_exports(serve: Serve, vllm: str) -> None:
    """The service runs on the real vLLM, whose metrics it hands on."""
    client = serve(url=vllm)
    client.post("/v1/chat/completions", json=ask(max_tokens=4)).raise_for_status()
    service, engine = client.get("/metrics"), client.get("/metrics/engines/0")
    known = exported(service) | {name for name in exported(engine) if name.startswith("vllm:")}
    asked = set().union(*(names(expression) for expression in expressions()))
    assert {name for name in asked if name.startswith("ratchet_")}
    assert {name for name in asked if name.startswith("vllm:")}
    assert asked - known - BY_PROMETHEUS == set()


def exported(answer: httpx.Response) -> set[str]:
    """Names of families and their series: also of those that have no sample yet, by their types."""
    lines = answer.raise_for_status().text.splitlines()
    types = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE "))
    series = {re.split(r"[{ ]", line, maxsplit=1)[0] for line in lines if not line.startswith("#")}
    histograms = {name for name, kind in types.items() if kind == "histogram"}
    return (
        series
        | {name for name, kind in types.items() if kind in ("counter", "gauge")}
        | {f"{name}_{end}" for name in histograms for end in ("bucket", "sum", "count")}
    )


def test_there_is_a_dashboard_each_for_service_engines_and_learning() -> None:
    found = boards()
    assert found.keys() == {"service", "engines", "learning"}
    for board in found.values():
        assert len(board["panels"]) >= 12
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        assert all(panel["datasource"]["uid"] == "prometheus" for panel in board["panels"])
    assert len({board["uid"] for board in found.values()}) == 3


def test_no_two_panels_lie_on_each_other() -> None:
    for board in boards().values():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert place["x"] + place["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells


def test_every_metric_of_ours_is_looked_at_somewhere() -> None:
    text = (DEPLOY / "README.md").read_text()
    ours = set(re.findall(r"^\| `(ratchet_\w+)`", text, re.MULTILINE))
    asked = set().union(*(names(expression) for expression in expressions()))
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert ours - stems - asked == set()


def test_grafana_finds_its_source_and_the_boards() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "ratchet.yml").read_text())["providers"]
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())["services"]["grafana"]
    assert source["uid"] == "prometheus"
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in compose["volumes"]
