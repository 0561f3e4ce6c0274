# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alerts ask for what servers offer, in a language that Prometheus reads."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from metric_names import our_series, series_of_vllm

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/ems-vllm.json").read_text(encoding="utf-8"))
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")


def panels() -> list[Any]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Every query, by where it stands."""
    found = {
        f"{panel['title']}, {target['legendFormat']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }
    return found | {rule["alert"]: rule["expr"] for rule in ALERTS}


def promtool(*arguments: str) -> None:
    result = subprocess.run(
        [str(PROMTOOL), *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_metric_is_one_that_a_server_offers() -> None:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vllm is not installed")
    offered = our_series() | series_of_vllm(Path(vllm.origin).parent / "v1/metrics/loggers.py")
    asked = {
        name: where
        for where, query in queries().items()
        for name in re.findall(r"\b(?:ems_)?vllm:\w+", query)
    }
    assert {"ems_vllm:compactions_total", "vllm:kv_cache_usage_perc"} <= asked.keys()
    assert {name: where for name, where in asked.items() if name not in offered} == {}


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = " ".join(queries().values())
    for name in our_series():
        assert name in shown or name.endswith(("_count", "_sum", "blocks_freed_total")), name


@needs_promtool
def test_every_query_parses(tmp_path: Path) -> None:
    # Grafana puts in what stands for the time between points and for the time that is shown.
    rules = [
        {"record": f"dashboard:query:{number}", "expr": re.sub(r"\$__\w+", "5m", query)}
        for number, query in enumerate(queries().values())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))


@needs_promtool
def test_prometheus_takes_its_configuration() -> None:
    promtool("check", "config", "deploy/prometheus/prometheus.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "tests/deploy/alerts.yml")


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    for rule in ALERTS:
        assert f"| `{rule['alert']}` |" in page
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_dashboard_is_what_its_script_writes() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    from make_dashboard import build

    assert json.loads(build()) == DASHBOARD, "run `python deploy/grafana/make_dashboard.py`"


def test_panels_say_what_they_show() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert {"datasource", "model_name", "engine"} <= variables
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            used = set(re.findall(r'"\$(\w+)"', target["expr"]))
            assert used <= variables, panel["title"]
            assert "model_name" in used, panel["title"]


def test_panels_do_not_overlap() -> None:
    taken = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
                assert x < 24


def test_compose_shows_it_on_this_machine_only() -> None:
    services = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
    for name in ("prometheus", "grafana"):
        service = services[name]
        assert service["profiles"] == ["monitoring"]
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source


def test_prometheus_asks_every_server_of_compose() -> None:
    configuration = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (scraped,) = configuration["scrape_configs"]
    (target,) = scraped["static_configs"][0]["targets"]
    name, port = target.split(":")
    services = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
    servers = [service for service in services.values() if "build" in service]
    assert len(servers) == 2
    for service in servers:
        assert name in service["networks"]["default"]["aliases"]
        assert service["ports"] == [f"{port}:{port}"]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    folder = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards/ems-vllm.yml").read_text())["providers"]
    prometheus = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    grafana = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
