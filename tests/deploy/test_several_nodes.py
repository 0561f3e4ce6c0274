# SPDX-License-Identifier: Apache-2.0
"""The examples for one server on several nodes: LeaderWorkerSet, and Ray Serve LLM on KubeRay."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_dockerfile import instructions
from deploy.arguments import accepted_by_vllm

import ems_vllm
from ems_vllm.config import load_config
from ems_vllm.keys import CONFIG_KEY

ROOT = Path(__file__).resolve().parents[2]
# What LeaderWorkerSet sets in every container.
NODES = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "1", "$(LWS_LEADER_ADDRESS)": "leader"}


def documents(path: str) -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((ROOT / "deploy" / path).read_text())}


@pytest.fixture(scope="module")
def leader_worker() -> dict[str, Any]:
    return documents("kubernetes/leader-worker/leader-worker-set.yaml")


@pytest.fixture(scope="module")
def ray_service() -> Any:
    return documents("ray/ray-service.yaml")["RayService"]["spec"]


def roles(leader_worker: dict[str, Any]) -> tuple[Any, Any]:
    template = leader_worker["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return template["leaderTemplate"], template["workerTemplate"]


def container_of(template: Any) -> Any:
    (container,) = template["spec"]["containers"]
    return container


def filled(arguments: list[str]) -> list[str]:
    for name, value in NODES.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    return arguments


def test_gpus_of_all_nodes_are_used(leader_worker: dict[str, Any]) -> None:
    size = leader_worker["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["size"]
    for template in roles(leader_worker):
        container = container_of(template)
        arguments = accepted_by_vllm(filled(container["args"]))
        assert arguments.kv_compression == "ems"
        assert (arguments.nnodes, arguments.node_rank, arguments.master_addr) == (2, 1, "leader")
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        ranks = arguments.tensor_parallel_size * arguments.pipeline_parallel_size
        assert ranks == size * gpus
        assert container["image"] == f"ems-vllm:{ems_vllm.__version__}"


def test_workers_are_started_as_their_leader_without_http(leader_worker: dict[str, Any]) -> None:
    leader, worker = (container_of(template) for template in roles(leader_worker))
    assert worker["args"] == [*leader["args"], "--headless"]
    assert "ports" not in worker
    assert "readinessProbe" not in worker
    # A leader is ready only with its workers.
    assert leader_worker["LeaderWorkerSet"]["spec"]["startupPolicy"] == "LeaderCreated"


def test_service_finds_the_leader_alone(leader_worker: dict[str, Any]) -> None:
    leader, worker = roles(leader_worker)
    selector = leader_worker["Service"]["spec"]["selector"].items()
    assert selector <= leader["metadata"]["labels"].items()
    assert not selector <= worker["metadata"]["labels"].items()


def test_compression_is_an_engine_argument_of_ray(ray_service: Any) -> None:
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs

    (application,) = yaml.safe_load(ray_service["serveConfigV2"])["applications"]
    (model,) = application["args"]["llm_configs"]
    arguments = model["engine_kwargs"]
    assert arguments.keys() <= {field.name for field in fields(AsyncEngineArgs)}
    settings = load_config(arguments["additional_config"][CONFIG_KEY])
    assert settings is not None
    assert (settings.recipe, settings.budget) == ("ems", 2048)
    (workers,) = ray_service["rayClusterConfig"]["workerGroupSpecs"]
    gpus = container_of(workers["template"])["resources"]["limits"]["nvidia.com/gpu"]
    ranks = arguments["tensor_parallel_size"] * arguments["pipeline_parallel_size"]
    assert ranks == workers["replicas"] * gpus


def test_image_of_ray_is_the_server_with_the_ray_that_is_asked_for(ray_service: Any) -> None:
    steps = instructions(ROOT / "deploy/ray/Dockerfile")
    version = ray_service["rayClusterConfig"]["rayVersion"]
    assert any(f"ray[serve]=={version}" in rest for keyword, rest in steps if keyword == "RUN")
    assert steps[-1] == ("USER", "2000:0")
