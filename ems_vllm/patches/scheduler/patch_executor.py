# SPDX-License-Identifier: Apache-2.0
"""Executor: refuse settings that nobody has acted upon."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.keys import CONFIG_KEY
from ems_vllm.patches.record import Patch, Process
from ems_vllm.vllm_versions import by_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.executor.abstract import Executor


def _wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Executor, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        additional = vllm_config.additional_config
        if isinstance(additional, dict) and CONFIG_KEY in additional:
            from ems_vllm.engine.frontend.switch_on import check_activated

            check_activated(vllm_config)
        original(self, vllm_config, *args, **kwargs)

    return __init__


PATCHES = (
    Patch(
        target="vllm.v1.executor.abstract:Executor.__init__",
        wrap=_wrap_init,
        source_sha256=by_version(
            "31103cf2889954b3c242742ccef234398787e9472ff69f9dddc725d0e97bab19"
        ),
        process=Process.SCHEDULER,
        reason=(
            "A VllmConfig that was not made by EngineArgs has passed none of our checks, and its "
            "settings would have no effect. Executors are the first to see it where general "
            "plugins are loaded for certain."
        ),
        upstream="none filed",
        remove_when="general plugins get a check_and_update_config hook",
        always=True,
    ),
)
