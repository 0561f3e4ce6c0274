# SPDX-License-Identifier: Apache-2.0
"""What is installed: this build, vLLM and the patches that it takes, the platform."""

from __future__ import annotations

from collections.abc import Iterator

from ems_vllm.doctor.start.check import Check, degraded, ok, refused
from ems_vllm.vllm_versions import SUPPORTED, TESTED


def installed() -> Iterator[Check]:
    """Checks for which no model is needed; none may be refused for the others to make sense."""
    try:
        import ems_vllm

        info = ems_vllm.build_info()
    except ImportError as error:
        yield refused(
            "build",
            f"ems-vllm {ems_vllm.__version__} has no compiled operators ({error})",
            "build it: make build, or pip install --no-build-isolation .",
        )
        return
    try:
        from vllm.plugins import load_general_plugins
    except ImportError as error:
        yield refused(
            "vllm", f"vLLM cannot be imported ({error})", f"install vllm{SUPPORTED} beside it"
        )
        return
    load_general_plugins()
    yield _build(info["version"], list(info["cuda_archs"]), list(info["cpu_variants"]))
    yield from _vllm()
    yield _platform()


def _build(version: str, archs: list[str], variants: list[str]) -> Check:
    from vllm.platforms import current_platform

    from ems_vllm.engine import kernels

    held = f"ems-vllm {version}, kernels for CPUs ({', '.join(variants)})"
    held += f" and for CUDA {', '.join(archs)}" if archs else "; none for CUDA"
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is None or not archs:
        # A GPU without any has a rule of its own, with the others of the configuration.
        return ok("build", held)
    compiled = (arch.removesuffix("+PTX") for arch in archs)
    if any(kernels.covers(arch, *capability) for arch in archs) and not any(
        kernels.covers(arch, *capability) for arch in compiled
    ):
        number = capability.as_version_str()
        return degraded(
            "build",
            f"{held}; this GPU's {number} is served by PTX, which its driver compiles at the first "
            "use",
            f"build with {number} in TORCH_CUDA_ARCH_LIST",
        )
    return ok("build", held)


def _vllm() -> Iterator[Check]:
    from ems_vllm.patches import registry, target

    version = target.installed_version()
    problems = list(registry.problems())
    # One that is too old or too new says so at each patch.
    for problem in problems if target.fits(SUPPORTED) else problems[:1]:
        yield refused("vllm", problem)
    if problems:
        return
    num_patches, num_contracts = registry.count()
    fits = (
        f"vllm {version}: all {num_patches} patches fit, and the {num_contracts} functions relied "
        "upon are those that were read"
    )
    if version in TESTED:
        yield ok("vllm", fits)
    else:
        yield degraded(
            "vllm",
            f"{fits}; this version was not tested",
            f"install vllm {' or '.join(TESTED)}",
        )


def _platform() -> Check:
    from vllm.platforms import current_platform

    if type(current_platform).__module__.startswith("ems_vllm."):
        return ok("platform", "CPU platform of ems-vllm: vLLM's engine on PyTorch, to try it out")
    if current_platform.is_unspecified():
        return refused(
            "platform",
            "vLLM finds no device here",
            "ask where the server is to run, or set EMS_CPU_PLATFORM=1 to try it on the CPU",
        )
    capability = current_platform.get_device_capability()
    number = f", compute capability {capability.as_version_str()}" if capability else ""
    return ok("platform", f"{current_platform.get_device_name()}{number}")
