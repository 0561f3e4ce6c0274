# SPDX-License-Identifier: Apache-2.0
"""Compression methods as compositions; importing this package registers every component."""

import importlib
import pkgutil

from ems_vllm.policies import allocators, mergers, scorers, selectors

for _package in (scorers, allocators, selectors, mergers):
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")
