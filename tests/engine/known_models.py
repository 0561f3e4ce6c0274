# SPDX-License-Identifier: Apache-2.0
"""What happens to well-known models, from their public configurations, without their weights.

model_configs/ holds excerpts of their config.json, with the keys that decide about attention.
vLLM's own classes are built from them on the meta device, at full size, and asked for their
KV-cache specs. `python tests/engine/known_models.py` writes docs/models.json, which
docs/generate.py turns into a table; tests/engine/test_known_models.py keeps it in step.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).parent / "model_configs"
OUTCOMES = ROOT / "docs" / "models.json"
DEVICES = ("cuda", "cpu")
# One recipe that reads queries and one that does not.
RECIPES = ("ems", "knorm")

# Text models of those that see images too; the classes of the whole need an image library.
_TEXT_CLASSES = {
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
}
# Imported beside the text models, and not used.
_IMAGE_MODULES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


@dataclass(frozen=True)
class KnownModel:
    """A model as a worker knows it, without weights.

    Attributes:
        vllm_config: vLLM's configuration.
        layers: Attention layers by name.
        specs: KV-cache specs of the layers that own a cache; empty for a model that is refused
            before it is loaded.
    """

    vllm_config: Any
    layers: dict[str, Any]
    specs: dict[str, Any]


def names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


@functools.cache
def build(name: str, without_window: bool = False) -> KnownModel:
    """A model as vLLM makes it; within `process_groups` only.

    Args:
        name: Of its configuration.
        without_window: Whether vLLM is told, as an operator may, that there is no sliding window.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import registry
    from vllm.utils.torch_utils import set_default_torch_dtype

    with (
        _image_modules(),
        # vLLM looks at each class in a process of its own, which takes half a minute.
        mock.patch.object(registry, "_run_in_subprocess", lambda inspect: inspect()),
        tempfile.TemporaryDirectory() as folder,
    ):
        Path(folder, "config.json").write_text(json.dumps(_text_config(name)))
        vllm_config = EngineArgs(
            folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            hf_overrides={"sliding_window": None} if without_window else {},
        ).create_engine_config()
        if vllm_config.model_config.use_mla:
            return KnownModel(vllm_config, {}, {})
        with set_current_vllm_config(vllm_config):
            # Models with experts have one group more than others.
            parallel_state.destroy_model_parallel()
            parallel_state.ensure_model_parallel_initialized(1, 1)
            with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
                initialize_model(vllm_config)
    context = vllm_config.compilation_config.static_forward_context
    layers = {k: layer for k, layer in context.items() if isinstance(layer, AttentionLayerBase)}
    specs = {
        key: layer.get_kv_cache_spec(vllm_config)
        for key, layer in layers.items()
        if getattr(layer, "kv_sharing_target_layer_name", None) is None
    }
    return KnownModel(vllm_config, layers, specs)


@contextmanager
def _image_modules() -> Iterator[None]:
    """Stand-ins for the image library where it is missing."""
    # It looks for the library itself, and is not to find the stand-ins.
    import transformers  # noqa: F401

    missing = [] if importlib.util.find_spec("torchvision") else list(_IMAGE_MODULES)
    sys.modules.update({name: mock.MagicMock() for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _text_config(name: str) -> dict[str, Any]:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    (architecture,) = config["architectures"]
    if architecture not in _TEXT_CLASSES:
        return config
    return {**config["text_config"], "architectures": [_TEXT_CLASSES[architecture]]}


def choose(model: KnownModel, device: str, recipe: str) -> Any:
    """What the start-up checks of a worker on a device decide: a LayerChoice.

    Raises:
        ConfigError: the model is refused.
    """
    from ems_vllm.config import load_config
    from ems_vllm.engine.frontend.compatibility import check_compatibility
    from ems_vllm.engine.worker import layer_choice
    from ems_vllm.engine.worker.refusals import NO_FULL_ATTENTION

    config = load_config({"recipe": recipe})
    assert config is not None
    check_compatibility(model.vllm_config, config)
    platform = SimpleNamespace(is_cuda=lambda: device == "cuda")
    with mock.patch.object(layer_choice, "current_platform", platform):
        choice = layer_choice.choose_layers(model.specs, model.layers, config.scorer)
    if not choice.compressed:
        raise NO_FULL_ATTENTION.error("a model", recipe, layers=choice.describe_kept())
    return choice


def outcome(model: KnownModel, device: str, recipe: str) -> str:
    """The decision in words."""
    from ems_vllm.config import ConfigError

    try:
        choice = choose(model, device, recipe)
    except ConfigError as error:
        reason = re.search(r"kv_compression='\w+': (.*?);", str(error))
        assert reason is not None
        return f"refused: {reason[1]}"
    if not choice.kept:
        return f"all {len(choice.compressed)} layers"
    total = len(choice.compressed) + len(choice.kept)
    return f"{len(choice.compressed)} of {total} layers; kept: {choice.describe_kept()}"


def outcomes(name: str) -> dict[str, dict[str, str]]:
    """What happens by device and recipe."""
    model = build(name)
    return {
        device: {recipe: outcome(model, device, recipe) for recipe in RECIPES} for device in DEVICES
    }


@contextmanager
def process_groups() -> Iterator[None]:
    """The process groups of a single rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.utils.network_utils import get_open_port

    with set_current_vllm_config(VllmConfig()):
        address = f"tcp://127.0.0.1:{get_open_port()}"
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
    try:
        yield
    finally:
        build.cache_clear()
        parallel_state.cleanup_dist_env_and_memory()


def main() -> None:
    with process_groups():
        found = {name: outcomes(name) for name in names()}
    OUTCOMES.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
