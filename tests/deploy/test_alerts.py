"""Prometheus' configuration and alerts, by Prometheus' own tool. `alerts.test.yml` fires each alert."""

from pathlib import Path
from typing import Any

import yaml

from tests.deploy.conftest import DEPLOY, Tool

PROMETHEUS = DEPLOY / "prometheus"


def read(name: str) -> Any:
    return yaml.safe_load((PROMETHEUS / name).read_text())


def alerts() -> list[dict[str, Any]]:
    return [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]


def test_the_configuration_is_one_that_prometheus_takes(promtool: Tool, tmp_path: Path) -> None:
    """With paths of this machine instead of the container's."""
    (tmp_path / "key").write_text("rk-1")
    text = (PROMETHEUS / "prometheus.yml").read_text()
    text = text.replace("/run/secrets/ratchet_key", str(tmp_path / "key"))
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus", str(PROMETHEUS)))
    assert "SUCCESS" in promtool("check", "config", str(tmp_path / "prometheus.yml"))


def test_every_alert_fires_where_it_should_and_not_beside_it(promtool: Tool) -> None:
    promtool("check", "rules", str(PROMETHEUS / "alerts.yml"))
    assert "SUCCESS" in promtool("test", "rules", str(PROMETHEUS / "alerts.test.yml"))


def test_no_alert_is_without_a_test_that_fires_it() -> None:
    fired = {
        case["alertname"]
        for test in read("alerts.test.yml")["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in alerts()}
    assert len(fired) > 15


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "action"}
