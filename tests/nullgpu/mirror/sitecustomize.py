# SPDX-License-Identifier: Apache-2.0
"""Loaded by every Python of a rehearsal (rehearse.py): packages that the GPU machine does not have
cannot be imported, and nobody stumbles over kernels that compute nothing."""

import importlib.metadata
import sys
import sysconfig
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

_LISTED = Path(__file__).resolve().parents[1] / "machine.txt"


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


class _MachinePackages(MetaPathFinder):
    """Python's own way along the path, blind to what the machine does not have."""

    def __init__(self) -> None:
        lines = _LISTED.read_text().splitlines()
        self._there = {_normal(line) for line in lines if line and not line.startswith("#")}
        self._packages = importlib.metadata.packages_distributions()
        self._site = sysconfig.get_paths()["purelib"]

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        owners = self._packages.get(name)
        if spec is None or path is not None or owners is None:
            return spec
        is_here = str(spec.origin).startswith(self._site)
        return None if is_here and self._there.isdisjoint(map(_normal, owners)) else spec

    invalidate_caches = staticmethod(PathFinder.invalidate_caches)
    find_distributions = staticmethod(PathFinder.find_distributions)


def _install_stand_in(module) -> None:
    from nullgpu import stand_in

    stand_in.install()


def _without_numbers(name):
    """Makes a module's check of what kernels compute one that finds nothing wrong."""

    def change(module) -> None:
        setattr(module, name, lambda *args: None)

    return change


# What is done to a module as soon as it has been run.
_CHANGES = {
    "vllm.v1.worker.gpu.model_runner": _install_stand_in,
    # What is timed is compared with its reference first.
    "opbench.verify": _without_numbers("check"),
    # Serving falls back on Triton where FlashAttention is wrong.
    "gpu.smoke": _without_numbers("flash_attention"),
}


class _Changes(MetaPathFinder):
    """Finds the modules of _CHANGES, to change them."""

    def find_spec(self, name, path=None, target=None):
        if name not in _CHANGES:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _CHANGES[name](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path[sys.meta_path.index(PathFinder)] = _MachinePackages()
sys.meta_path.insert(0, _Changes())
