# SPDX-License-Identifier: Apache-2.0
"""What is in the images, as far as that can be seen without building them."""

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_dockerfile import instructions
from deploy.arguments import accepted_by_vllm

import ems_vllm

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "Dockerfile.cpu"]
VLLM_VERSION = re.search(r"^vllm==(\S+)$", (ROOT / "requirements/cuda.txt").read_text(), re.M)[1]


def final_stage(dockerfile: Path) -> dict[str, str]:
    """The last instruction of each kind after the last FROM."""
    stage: dict[str, str] = {}
    for keyword, rest in instructions(dockerfile):
        stage = {} if keyword == "FROM" else stage | {keyword: rest}
    return stage


@cache
def compose() -> Any:
    text = (ROOT / "deploy/docker-compose.yml").read_text()
    # ${NAME:-default} -> default
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfile:
    def test_base_images_are_pinned(self, dockerfile: Path) -> None:
        arguments = dict(
            rest.split("=", 1) for keyword, rest in instructions(dockerfile) if keyword == "ARG"
        )
        for keyword, rest in instructions(dockerfile):
            if keyword == "FROM":
                image = re.sub(r"\$\{(\w+)\}", lambda name: arguments[name[1]], rest.split()[0])
                assert re.search(r":v?\d+\.\d+\.\d+", image), image

    def test_server_is_not_root(self, dockerfile: Path) -> None:
        # By number: Kubernetes refuses a name when it must not be root.
        assert re.fullmatch(r"[1-9]\d*:\d+", final_stage(dockerfile)["USER"])

    def test_health_is_checked_and_entry_point_is_vllm_serve(self, dockerfile: Path) -> None:
        stage = final_stage(dockerfile)
        assert "http://localhost:8000/health" in stage["HEALTHCHECK"]
        assert stage["EXPOSE"] == "8000"
        assert json.loads(stage["ENTRYPOINT"]) == ["vllm", "serve"]
        json.loads(stage["HEALTHCHECK"].split("CMD", 1)[1])

    def test_copied_files_exist_and_are_in_the_context(self, dockerfile: Path) -> None:
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        for keyword, rest in instructions(dockerfile):
            if keyword == "COPY":
                *sources, _ = [word for word in shlex.split(rest) if not word.startswith("--")]
                for source in sources:
                    assert (ROOT / source).exists(), source
                    assert source not in ignored, source

    def test_copied_files_suffice_to_build(self, dockerfile: Path) -> None:
        copied = " ".join(rest for keyword, rest in instructions(dockerfile) if keyword == "COPY")
        for needed in ("pyproject.toml", "setup.py", "README.md", "csrc", "configs", "ems_vllm"):
            assert needed in copied.split(), needed


def test_gpu_image_is_the_pinned_vllm() -> None:
    arguments = [rest for keyword, rest in instructions(ROOT / "Dockerfile") if keyword == "ARG"]
    assert f"VLLM_IMAGE=vllm/vllm-openai:v{VLLM_VERSION}" in arguments


def test_cpu_image_serves_a_pretrained_model_with_compression() -> None:
    arguments = json.loads(final_stage(ROOT / "Dockerfile.cpu")["CMD"])
    assert arguments[0] == "models/smollm2"
    made = [
        rest
        for keyword, rest in instructions(ROOT / "Dockerfile.cpu")
        if keyword == "RUN" and "make model-smollm2" in rest
    ]
    # Its downloads would stay in the image.
    assert made[0].endswith("rm -rf build")
    assert accepted_by_vllm(arguments).kv_compression == "ems"


SERVERS = {name: one for name, one in compose()["services"].items() if "build" in one}


@pytest.mark.parametrize("service", SERVERS.values(), ids=SERVERS)
def test_compose_service(service: Any) -> None:
    dockerfile = service["build"].get("dockerfile", "Dockerfile")
    assert (ROOT / "deploy" / service["build"]["context"] / dockerfile).is_file()
    assert service["image"].endswith(f":{ems_vllm.__version__}")
    assert service["ports"] == ["8000:8000"]
    if "command" in service:
        assert accepted_by_vllm(service["command"]).kv_compression == "ems"


def test_named_volumes_of_compose_are_declared() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith("./") or source in compose()["volumes"]
