# SPDX-License-Identifier: Apache-2.0
"""When the CPU platform offers itself, and what it fills in."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import ems_vllm.cpu_platform

pytest.importorskip("vllm")

CLASS_PATH = "ems_vllm.cpu_platform.cpu.TorchCPUPlatform"
on_cpu_only = pytest.mark.skipif(
    torch.version.cuda is not None, reason="the platform is for torch without an accelerator"
)


@pytest.fixture
def no_switch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("EMS_CPU_PLATFORM", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(ems_vllm.cpu_platform.metadata, "version", lambda name: "0.32.0")
    return monkeypatch


def test_offered_where_torch_has_no_accelerator(no_switch: pytest.MonkeyPatch) -> None:
    assert ems_vllm.cpu_platform.cpu_platform() == CLASS_PATH


def test_not_offered_with_cuda(no_switch: pytest.MonkeyPatch) -> None:
    no_switch.setattr(torch.version, "cuda", "13.0")
    assert ems_vllm.cpu_platform.cpu_platform() is None


def test_not_offered_with_rocm(no_switch: pytest.MonkeyPatch) -> None:
    no_switch.setattr(torch.version, "hip", "7.0")
    assert ems_vllm.cpu_platform.cpu_platform() is None


def test_not_offered_with_a_cpu_build_of_vllm(no_switch: pytest.MonkeyPatch) -> None:
    no_switch.setattr(ems_vllm.cpu_platform.metadata, "version", lambda name: "0.32.0+cpu")
    assert ems_vllm.cpu_platform.cpu_platform() is None


def test_switch_overrides(no_switch: pytest.MonkeyPatch) -> None:
    no_switch.setenv("EMS_CPU_PLATFORM", "0")
    assert ems_vllm.cpu_platform.cpu_platform() is None
    no_switch.setenv("EMS_CPU_PLATFORM", "1")
    no_switch.setattr(torch.version, "cuda", "13.0")
    assert ems_vllm.cpu_platform.cpu_platform() == CLASS_PATH


def test_other_switch_is_ignored_loudly(no_switch: pytest.MonkeyPatch) -> None:
    no_switch.setenv("EMS_CPU_PLATFORM", "yes")
    with pytest.warns(UserWarning, match="neither 0 nor 1"):
        assert ems_vllm.cpu_platform.cpu_platform() == CLASS_PATH


@on_cpu_only
def test_vllm_selects_it_and_platform_import_is_idempotent() -> None:
    script = (
        "import importlib, ems_vllm.cpu_platform.cpu as cpu\n"
        "from vllm.platforms import current_platform\n"
        "assert isinstance(current_platform, cpu.TorchCPUPlatform)\n"
        "importlib.reload(cpu)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@on_cpu_only
class TestBackendChoice:
    plain = SimpleNamespace(use_mla=False, use_sparse=False)

    def test_default_respects_an_override(self) -> None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from ems_vllm.cpu_platform.cpu import TorchCPUPlatform

        choose = TorchCPUPlatform.get_attn_backend_cls
        default = "ems_vllm.cpu_platform.attention.TorchCPUBackend"
        assert choose(None, self.plain) == default
        register_backend(AttentionBackendEnum.TORCH_CPU, "some.Wrapper")
        try:
            assert choose(None, self.plain) == "some.Wrapper"
        finally:
            register_backend(AttentionBackendEnum.TORCH_CPU, default)

    def test_former_name_is_the_same_backend(self) -> None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from ems_vllm.cpu_platform.cpu import TorchCPUPlatform

        backend = AttentionBackendEnum.TORCH_CPU
        default = backend.get_path()
        former = AttentionBackendEnum["CPU_REFERENCE"]
        register_backend(backend, "some.Wrapper")
        try:
            assert TorchCPUPlatform.get_attn_backend_cls(former, self.plain) == "some.Wrapper"
        finally:
            register_backend(backend, default)

    def test_selected_backend_is_let_through(self) -> None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        from ems_vllm.cpu_platform.cpu import TorchCPUPlatform

        chosen = TorchCPUPlatform.get_attn_backend_cls(AttentionBackendEnum.TRITON_ATTN, self.plain)
        assert chosen == AttentionBackendEnum.TRITON_ATTN.get_path()

    def test_latent_attention_is_refused(self) -> None:
        from ems_vllm.cpu_platform.cpu import TorchCPUPlatform

        with pytest.raises(NotImplementedError, match="on a GPU"):
            TorchCPUPlatform.get_attn_backend_cls(
                None, SimpleNamespace(use_mla=True, use_sparse=False)
            )


@on_cpu_only
class TestProcesses:
    def test_one_thread_unless_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ems_vllm.cpu_platform import cpu

        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        cpu._limit_threads()
        assert os.environ["OMP_NUM_THREADS"] == "3"
        monkeypatch.delenv("OMP_NUM_THREADS")
        cpu._limit_threads()
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert torch.get_num_threads() == 1

    @pytest.mark.parametrize(
        ("chosen", "threads", "method"),
        [(None, "1", "fork"), (None, "2", "spawn"), ("spawn", "1", "spawn")],
    )
    def test_start_method(
        self, chosen: str | None, threads: str, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ems_vllm.cpu_platform import cpu

        monkeypatch.setattr(cpu, "_chosen_start_method", chosen)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        # What `vllm serve` sets by itself.
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        cpu._choose_start_method()
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == method
