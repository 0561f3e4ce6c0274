# SPDX-License-Identifier: Apache-2.0
"""Executor: refuse settings that nobody has acted upon."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.keys import CONFIG_KEY
from ems_vllm.patches.record import Patch

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
        vllm=">=0.32.0,<0.33",
        source_sha256={
            "0.32.0": "31103cf2889954b3c242742ccef234398787e9472ff69f9dddc725d0e97bab19"
        },
        reason=(
            "A VllmConfig that was not made by EngineArgs has passed none of our checks, and its "
            "settings would have no effect. Executors are the first to see it where general "
            "plugins are loaded for certain."
        ),
        remove_when="general plugins get a check_and_update_config hook",
    ),
)
