# SPDX-License-Identifier: Apache-2.0
"""The manifests that are written from the Helm chart, and those for several nodes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_dockerfile import instructions
from deploy.arguments import accepted_by_vllm

import ems_vllm

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = {path.stem: path for path in sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))}


def documents(name: str) -> dict[str, Any]:
    """Of a manifest, by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all(MANIFESTS[name].read_text())}


def container_of(workload: Any) -> Any:
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container


@pytest.fixture(params=MANIFESTS)
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    return documents(request.param)


def test_manifest_is_what_kubernetes_takes(manifest: dict[str, Any]) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for document in manifest.values():
        schemas.validate(document, schemas.latest_version(), strict=True)


def test_flags_image_and_gpus(manifest: dict[str, Any]) -> None:
    container = container_of(manifest["Deployment"])
    arguments = accepted_by_vllm(container["args"])
    assert arguments.kv_compression == "ems"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == arguments.tensor_parallel_size
    assert container["image"] == f"ems-vllm:{ems_vllm.__version__}"


def test_pod_is_unprivileged(manifest: dict[str, Any]) -> None:
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    (*_, image_user) = [
        rest for keyword, rest in instructions(ROOT / "Dockerfile") if keyword == "USER"
    ]
    assert user == image_user
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    container = container_of(manifest["Deployment"])
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_pod_is_probed_and_found_by_its_service(manifest: dict[str, Any]) -> None:
    container = container_of(manifest["Deployment"])
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
        assert container[probe]["httpGet"]["port"] in ports
    service = manifest["Service"]["spec"]
    assert service["ports"][0]["targetPort"] in ports
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert manifest["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_pod_stores_its_cache(manifest: dict[str, Any]) -> None:
    volumes = manifest["Deployment"]["spec"]["template"]["spec"]["volumes"]
    mounts = {mount["name"] for mount in container_of(manifest["Deployment"])["volumeMounts"]}
    assert mounts == {volume["name"] for volume in volumes}
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in volumes
        if "persistentVolumeClaim" in volume
    ]
    assert claims == [manifest["PersistentVolumeClaim"]["metadata"]["name"]]


def test_requests_may_end_before_the_pod_is_killed(manifest: dict[str, Any]) -> None:
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    (flag,) = (a for a in container_of(manifest["Deployment"])["args"] if "shutdown" in a)
    assert 0 < int(re.sub(r"\D", "", flag)) < pod["terminationGracePeriodSeconds"]


def test_flags_for_the_production_stack() -> None:
    values = yaml.safe_load((ROOT / "deploy/production-stack/values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    assert model["tag"] == ems_vllm.__version__
    assert "lmcacheConfig" not in model
    arguments = accepted_by_vllm([model["modelURL"], *model["vllmConfig"]["extraArgs"]])
    assert arguments.kv_compression == "ems"
    # Alerts look at jobs of this name, and a ServiceMonitor calls them as their service.
    assert "ems-vllm" in model["name"]
