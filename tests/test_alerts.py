"""Alerts and dashboard: they name metrics that there are, and sections that can be read; Prometheus takes the rules."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command import ROOT
from listener.metrics import Metrics

PROMETHEUS = ROOT / "docker" / "prometheus"
RULES = PROMETHEUS / "alerts.yml"
RULE_TESTS = ROOT / "tests" / "alerts.yml"
DASHBOARD = ROOT / "docker" / "grafana" / "listener.json"
OPERATIONS = ROOT / "docs" / "operations.md"
SAMPLES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def shown_samples() -> set[str]:
    """What a line of /metrics can begin with; families with labels are in the registry before they have a sample."""
    families = Metrics().registry.collect()
    return {family.name + suffix for family in families for suffix in SAMPLES[family.type]}


def named_samples(text: str) -> set[str]:
    return set(re.findall(r"\blistener_\w+", text))


def alerts() -> dict[str, str]:
    """The text of each rule."""
    _, *rules = re.split(r"- alert: ", RULES.read_text())
    return {rule.partition("\n")[0]: rule for rule in rules}


def expressions() -> list[str]:
    """The queries of the dashboard, and of the variable that lists its views."""
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [variable["query"] for variable in dashboard["templating"]["list"]]
    return queries + [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def promtool(*arguments: object) -> str:
    """What promtool says where it is content."""
    program = shutil.which("promtool", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program is not None, "promtool is not there: Debian has it in the package prometheus"
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_metric_that_an_alert_or_a_panel_names_is_shown() -> None:
    assert named_samples(RULES.read_text()) - shown_samples() == set()
    assert named_samples("\n".join(expressions())) - shown_samples() == set()
    assert named_samples(RULE_TESTS.read_text()) - shown_samples() == set()


def test_every_metric_is_on_the_dashboard() -> None:
    on_it = named_samples("\n".join(expressions()))
    for family in Metrics().registry.collect():
        assert on_it & {family.name + suffix for suffix in SAMPLES[family.type]}, family.name


def test_every_alert_says_how_bad_it_is_what_was_measured_and_where_to_read_on() -> None:
    headings = re.findall(r"^#+ (.+)$", OPERATIONS.read_text(), re.MULTILINE)
    for name, rule in alerts().items():
        assert re.search(r"severity: (critical|warning)\b", rule), name
        assert re.search(r"^ +for: \d+[ms]$", rule, re.MULTILINE), name
        assert re.search(r"summary: .*\{\{ \$value", rule), name
        assert f"runbook: docs/operations.md#{name.lower()}\n" in rule, name
        assert name in headings


def test_every_alert_is_tested_to_fire_and_not_to() -> None:
    text = RULE_TESTS.read_text()
    for name in alerts():
        assert f"alertname: {name}, exp_alerts: []" in text, name
        assert re.search(rf"alertname: {name}\n +exp_alerts:\n", text), name


@pytest.mark.debian
def test_prometheus_takes_its_configuration_and_the_rules() -> None:
    assert f"{len(alerts())} rules found" in promtool(
        "check", "config", "--lint=all", "--lint-fatal", PROMETHEUS / "prometheus.yml"
    )


@pytest.mark.debian
def test_each_alert_fires_for_what_it_is_meant_for_and_for_nothing_else() -> None:
    promtool("test", "rules", RULE_TESTS)
