# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform without its compiled kernels, and with defaults for trying things out."""

import os
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum
from vllm.utils.mem_constants import GiB_bytes
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = init_logger(f"vllm.{__name__}")

_BACKEND = "TORCH_CPU"
# What it was called before; --attention-backend takes both.
_FORMER_BACKEND = "CPU_REFERENCE"
_BLOCK_SIZE = 16
_KV_CACHE_BYTES = GiB_bytes
_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"

# Read at import: `vllm serve` sets it to spawn later, and then the user's choice cannot be told.
_chosen_start_method = os.environ.get(_START_METHOD)

# vLLM calls these when a process ends, and they raise where torch has no accelerator.
torch.accelerator.empty_cache = lambda: None
torch.accelerator.empty_host_cache = lambda: None

for _name in (_BACKEND, _FORMER_BACKEND):
    if _name not in AttentionBackendEnum.__members__:
        register_backend(_name, "ems_vllm.cpu_platform.attention.TorchCPUBackend")


class TorchCPUPlatform(CpuPlatform):
    """Runs the engine, both model runners included, on PyTorch operators alone."""

    # Not CPU: layers, linear operators and the sampler then take their native PyTorch path,
    # where vLLM's own CPU platform calls kernels that only its CPU build has.
    _enum = PlatformEnum.OOT
    simple_compile_backend = "eager"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        # The first one replaces float32 where the user leaves the dtype to vLLM.
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def import_kernels(cls) -> None:
        """There are none."""

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: "VllmConfig") -> None:
        from vllm.config import CompilationMode, CUDAGraphMode

        # Compiling costs minutes on a CPU and is not what this platform is for.
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        vllm_config.kernel_config.enable_jit_warmup = False

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Fill in what the user left open.

        CpuPlatform's own version is not called: it turns asynchronous scheduling and the
        in-process executor off, forces spawn, preloads libraries and picks blocks for its kernels.
        """
        if vllm_config.speculative_config is not None:
            _require_drafting(vllm_config.speculative_config.method)
        cache_config = vllm_config.cache_config
        if not cache_config.user_specified_block_size:
            cache_config.block_size = _BLOCK_SIZE
        if cache_config.kv_cache_memory_bytes is None:
            cache_config.kv_cache_memory_bytes = _KV_CACHE_BYTES
        parallel_config = vllm_config.parallel_config
        if parallel_config.worker_cls == "auto":
            parallel_config.worker_cls = "ems_vllm.cpu_platform.worker.TorchCPUWorker"
        vllm_config.compilation_config.cudagraph_capture_sizes = []
        vllm_config.profiler_config.torch_profiler_dump_cuda_time_total = False
        _limit_threads()
        _choose_start_method()

    @classmethod
    def _preferred_block_size_for_backends(
        cls, backend_classes: list[Any], default_block_size: int, vllm_config: "VllmConfig"
    ) -> int:
        # From 0.33 on CpuPlatform asks for one that suits its kernels.
        return super()._preferred_block_size_for_backends(backend_classes, _BLOCK_SIZE, vllm_config)

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: "AttentionSelectorConfig",
        num_heads: int | None = None,
    ) -> str:
        if attn_selector_config.use_mla or attn_selector_config.use_sparse:
            raise NotImplementedError(
                "this CPU platform runs plain multi-head and grouped-query attention; "
                "run models with latent (MLA) or sparse attention on a GPU"
            )
        backend = selected_backend
        if backend is None or backend.name == _FORMER_BACKEND:
            backend = AttentionBackendEnum[_BACKEND]
        logger.info_once("Using %s backend.", backend.name)
        return backend.get_path()

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "ems_vllm.cpu_platform.lora.TorchCPUPunicaWrapper"

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        from vllm.triton_utils import HAS_TRITON

        # With Triton there is its interpreter, and then vLLM's own kernels are to be run.
        if HAS_TRITON:
            return
        from vllm.triton_utils.dispatcher import register_kernels

        from ems_vllm.cpu_platform.slot_mapping import compute_slot_mapping

        with warnings.catch_warnings():
            # It looks at every attribute of every module, torch's deprecated ones included.
            warnings.simplefilter("ignore", FutureWarning)
            register_kernels(
                {"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping}
            )


def _require_drafting(method: str | None) -> None:
    """vLLM finds n-grams with numba, and accepts or rejects drafts with Triton kernels only.

    Raises:
        NotImplementedError: one of them is missing; both are where `make .triton` was run.
    """
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON or find_spec("numba") is None:
        raise NotImplementedError(
            f"speculative_config.method={method!r} needs numba and Triton, which this CPU platform "
            "does without: drop --speculative-config, or run it on a GPU."
        )


def _limit_threads() -> None:
    """One OpenMP thread per process unless the user chose a number.

    OpenMP's threads spin while they wait for each other. Several processes serve one model, and
    where cores are fewer than threads, twelve small requests took 15 s instead of 0.7 s.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        # The variable is for processes that start from scratch, the call for this one's forks.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def _choose_start_method() -> None:
    """The user's choice; else fork, which saves importing vLLM again, where it is safe.

    OpenMP's threads do not survive a fork: with more than one, a worker could wait for ever.
    """
    if _chosen_start_method is None:
        single_threaded = os.environ["OMP_NUM_THREADS"] == "1"
        os.environ[_START_METHOD] = "fork" if single_threaded else "spawn"
