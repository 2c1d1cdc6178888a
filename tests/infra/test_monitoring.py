"""Rules and dashboards: names that exist, alerts that fire when they must and are quiet when they must be."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.small_run import ROOT

MONITORING = ROOT / "infra" / "monitoring"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for rule in group["rules"]
]
CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "rule_cases.yaml").read_text())
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def used(text: str) -> set[str]:
    """Names of ours in an expression, without a counter's or histogram's suffix."""
    return {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in re.findall(r"ray_raydiffusion_\w+", text)}


def test_every_name_in_rules_and_dashboards_is_one_that_we_export() -> None:
    from pipeline.cluster import monitoring

    known = {*monitoring.names(), *monitoring.run_names()}
    texts = [str(rule["expr"]) for rule in RULES]
    shown: set[str] = set()
    for path in sorted(MONITORING.glob("*.json")):
        board = json.loads(path.read_text())
        found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        assert found, path
        texts += found
        shown |= used("\n".join(found))
    assert used("\n".join(texts)) - known == set()
    assert known - shown == set()  # and none is made that no dashboard shows


def test_every_metric_follows_the_one_rule_of_names() -> None:
    from pipeline.cluster import monitoring

    for name in monitoring.run_names():
        assert re.fullmatch(r"ray_raydiffusion_(training|feed|tracking|job)_[a-z_]+", name), name
        assert not re.search(r"_(ms|millis|kib|mib|gib|percent|minutes|hours)(_|$)", name), f"{name}: base units"


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 10
    for rule in RULES:
        assert set(rule["annotations"]) == {"summary", "runbook"}, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")


@needs_promtool
def test_each_alert_fires_from_series_that_must_and_not_from_series_that_must_not(tmp_path: Path) -> None:
    for wanted in ("fires", "quiet"):
        assert {case["alert"] for case in CASES if case["name"].endswith(wanted)} == {rule["alert"] for rule in RULES}
    done = _promtool(tmp_path, RULES)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_a_rule_that_never_fires_or_always_does_is_found(tmp_path: Path) -> None:
    for expression in ("vector(1) < 0", "vector(1)"):
        broken = [{**rule, "expr": expression} if rule["alert"] == "QueueAge" else rule for rule in RULES]
        done = _promtool(tmp_path, broken)
        assert done.returncode != 0
        assert "QueueAge" in done.stdout + done.stderr


def _promtool(folder: Path, rules: list[dict[str, Any]]) -> "subprocess.CompletedProcess[str]":
    """`promtool test rules` of these rules on all cases, without their texts, which quote values."""
    plain = [{key: value for key, value in rule.items() if key != "annotations"} for rule in rules]
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": plain}]}))
    severity = {rule["alert"]: rule["labels"]["severity"] for rule in rules}
    tests: list[dict[str, Any]] = []
    for case in CASES:
        labels = {**case["labels"], "severity": severity[case["alert"]]}
        expected = [{"exp_labels": labels}] if case["name"].endswith("fires") else []
        asked = {"eval_time": case["at"], "alertname": case["alert"], "exp_alerts": expected}
        tests.append({key: case[key] for key in ("interval", "input_series")} | {"alert_rule_test": [asked]})
    (folder / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": tests}))
    command = ["promtool", "test", "rules", str(folder / "tests.yaml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def scraped(port: int, label: str = "") -> dict[str, float]:
    """Each metric of ours at a Ray node's metrics port, the sum over its series that have `label`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = re.findall(r"^(ray_raydiffusion_\w+)\{([^}]*)\} (\S+)$", answer.read().decode(), re.MULTILINE)
    found: dict[str, float] = {}
    for name, labels, value in lines:
        if label not in labels:
            continue
        found[name] = found.get(name, 0.0) + float(value)
    return found


def until_scraped(wanted: set[str], seconds: float = 60, label: str = "") -> dict[str, float]:
    """The scrape of this machine's node, once it has all of them (Ray brings them every 10 s)."""
    import ray

    port, end = ray.nodes()[0]["MetricsExportPort"], time.monotonic() + seconds
    while True:
        found = scraped(port, label)
        missing = wanted - {name for full in found for name in used(full)}
        if not missing:
            return found
        assert time.monotonic() < end, f"not in the scrape: {sorted(missing)}"
        time.sleep(0.5)
