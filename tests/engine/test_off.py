# SPDX-License-Identifier: Apache-2.0
"""I2: with compression off, no object of vLLM's engine is touched."""

import subprocess
import sys

import pytest
from engine.harness import LLAMA
from processes import run_script

pytestmark = pytest.mark.slow

# In a process of its own: other tests switch compression on in this one.
_SCRIPT = """
import json, sys
from engine.harness import engine, tokens
with engine(None, json.loads(sys.argv[1])) as dense:
    dense.generate([tokens(300)], 4)
    from vllm.v1.attention.backends import registry
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST
    ours = lambda thing: thing.__module__.startswith("ems_vllm.")
    runner = dense.worker.model_runner
    layers = dense.worker.vllm_config.compilation_config.static_forward_context.values()
    overridden = [path for path in registry._ATTN_OVERRIDES.values() if "engine" in path]
    print(json.dumps({
        "patched": [
            f.__qualname__
            for f in (
                KVCacheManager.get_computed_blocks,
                InputProcessor.process_inputs,
                Scheduler._reserve_prefill_lookahead,
            )
            if ours(f) or hasattr(f, "__ems_patch__")
        ],
        "overridden_backends": overridden,
        "specs": [cls.__name__ for cls in _REGISTRY_KVCACHESPEC_LIST if ours(cls)],
        "managers": [type(m).__name__ for m in dense.managers if ours(type(m))],
        "worker": type(dense.worker).__module__,
        "builders": [
            type(b).__name__ for groups in runner.attn_groups for g in groups
            for b in g.metadata_builders if "Compressed" in type(b).__name__
        ],
        "impls": [type(x.impl).__name__ for x in layers if "Compressed" in type(x.impl).__name__],
        "modules": sorted(m for m in sys.modules if m.startswith(("ems_vllm.ops", "ems_vllm._C"))),
    }))
"""


def test_engine_without_compression_is_vllm_alone():
    assert run_script(_SCRIPT, LLAMA) == {
        "patched": [],
        "overridden_backends": [],
        "specs": [],
        "managers": [],
        # The CPU platform's worker, which runs vLLM on this machine with or without compression.
        "worker": "ems_vllm.cpu_platform.worker",
        "builders": [],
        "impls": [],
        "modules": [],
    }


def test_importing_the_package_imports_neither_vllm_nor_the_extension():
    script = (
        "import sys, ems_vllm, ems_vllm.plugin;"
        "heavy = lambda m: m in ('vllm', 'torch') or m.startswith('ems_vllm._');"
        "print([m for m in sys.modules if heavy(m)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['ems_vllm._version']"
