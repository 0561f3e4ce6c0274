# SPDX-License-Identifier: Apache-2.0
"""The Helm chart, rendered by Helm's own code where `pip install helm-python-sdk` was done."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.arguments import accepted_by_vllm

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/ems-vllm"


@pytest.fixture(scope="module")
def helm() -> Any:
    return pytest.importorskip("helm_python")


def render(chosen: dict[str, Any]) -> dict[str, Any]:
    """Documents by kind."""
    import render_chart as chart

    texts = [text for path, text in chart.render(chosen).items() if path.endswith(".yaml")]
    found = [one for text in texts for one in yaml.safe_load_all(text) if one]
    return {one["kind"]: one for one in found}


def test_defaults_are_in_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(values, schema)
    assert values.keys() == schema["properties"].keys() - {"global"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "m", "tensorParallel": 2}, schema)


def test_what_is_linked_is_what_compose_uses() -> None:
    for link, file in (
        ("alerts.yml", "prometheus/alerts.yml"),
        ("dashboard.json", "grafana/dashboards/ems-vllm.json"),
    ):
        assert (CHART / "files" / link).resolve() == ROOT / "deploy" / file


def test_lint_finds_nothing(helm: Any) -> None:
    for values in ({}, yaml.safe_load((CHART.parent / "values/autoscaled.yaml").read_text())):
        report = helm.lint(CHART, values, strict=True)
        assert [m for m in report["messages"] if m["severity"] > 1] == []
        assert report["errors"] == []


def test_manifests_are_what_the_chart_renders(helm: Any) -> None:
    import render_chart as chart

    for name in chart.WRITTEN:
        written = (chart.MANIFESTS / f"{name}.yaml").read_text(encoding="utf-8")
        assert written == chart.manifest(name), "run `python deploy/helm/render_chart.py`"


def test_settings_reach_the_server(helm: Any) -> None:
    documents = render(
        {
            "compression": {"config": {"budget": 512, "allocator": "uniform"}},
            "extraArgs": ["--enable-auto-tool-choice", "--tool-call-parser=hermes"],
            "maxModelLen": None,
            "tensorParallelSize": 2,
            "apiKey": {"existingSecret": "mine"},
            "huggingFace": {"existingSecret": "hub", "key": "t"},
        }
    )
    (container,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    arguments = accepted_by_vllm(container["args"])
    config = arguments.kv_compression_config
    config = json.loads(config) if isinstance(config, str) else config
    assert config == {"budget": 512, "allocator": "uniform"}
    assert arguments.max_model_len is None
    assert arguments.tool_call_parser == "hermes"
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 2}
    secrets = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"]}
    assert secrets == {
        "HF_TOKEN": {"name": "hub", "key": "t"},
        "VLLM_API_KEY": {"name": "mine", "key": "api-key"},
    }


@pytest.mark.parametrize("kind", ["keda", "hpa"])
def test_pods_are_added_for_waiting_requests_and_full_pools(helm: Any, kind: str) -> None:
    scaling = {"enabled": True, "kind": kind, "waitingRequests": 3, "cacheUsage": 0.8}
    documents = render({"autoscaling": scaling, "cache": {"enabled": False}})
    assert "replicas" not in documents["Deployment"]["spec"]
    name = documents["Deployment"]["metadata"]["name"]
    if kind == "keda":
        spec = documents["ScaledObject"]["spec"]
        waiting, full = (one["metadata"] for one in spec["triggers"])
        assert "vllm:num_requests_waiting" in waiting["query"]
        assert f'service="{name}"' in waiting["query"]
        assert "vllm:kv_cache_usage_perc" in full["query"]
        assert (waiting["threshold"], full["threshold"]) == ("3", "0.8")
    else:
        spec = documents["HorizontalPodAutoscaler"]["spec"]
        targets = [one["pods"]["target"]["averageValue"] for one in spec["metrics"]]
        assert targets == ["3", "800m"]
    assert spec["scaleTargetRef"]["name"] == name


def test_operator_of_prometheus_gets_servers_alerts_and_dashboard(helm: Any) -> None:
    on = {"enabled": True}
    documents = render({"serviceMonitor": on, "prometheusRule": on, "dashboard": on})
    service, monitor = documents["Service"], documents["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    # Alerts look at jobs of this name.
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "ems-vllm"
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    assert documents["PrometheusRule"]["spec"] == alerts
    dashboard = json.loads(documents["ConfigMap"]["data"]["ems-vllm.json"])
    assert dashboard["uid"] == "ems-vllm"
    # Otherwise Prometheus would scrape each pod twice.
    template = documents["Deployment"]["spec"]["template"]["metadata"]
    assert "annotations" not in template


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"replicas": 2}, "ReadWriteMany"),
        ({"autoscaling": {"enabled": True}}, "ReadWriteMany"),
        ({"terminationGracePeriodSeconds": 5}, "terminationGracePeriodSeconds"),
        ({"tensorParallel": 2}, "tensorParallel"),
        ({"autoscaling": {"kind": "cpu"}}, "kind"),
    ],
)
def test_what_cannot_work_is_refused(helm: Any, values: dict[str, Any], word: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(word)):
        render(values)


def test_everything_rendered_is_what_kubernetes_takes(helm: Any) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    on = {"enabled": True}
    documents = render(
        {
            "autoscaling": {"enabled": True, "kind": "hpa"},
            "cache": {"accessModes": ["ReadWriteMany"], "storageClassName": "fast"},
            "dashboard": on,
            "imagePullSecrets": [{"name": "registry"}],
            "nodeSelector": {"gpu": "h100"},
            "runtimeClassName": "nvidia",
            "serviceAccountName": "server",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        }
    )
    for document in documents.values():
        schemas.validate(document, schemas.latest_version(), strict=True)
