# SPDX-License-Identifier: Apache-2.0
"""Tasks, one file per family; importing this package registers all of them."""

import importlib
import pkgutil

from ems_vllm.eval.questions.tasks.base import TASKS, Task, TaskOptions

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["TASKS", "Task", "TaskOptions"]
