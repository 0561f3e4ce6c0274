# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.endpoint_plugins`: what vLLM attaches to its API server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ems_vllm.engine.status.routes import router
from ems_vllm.engine.status.source import Source
from ems_vllm.keys import STATUS_PLUGIN

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from vllm.engine.protocol import EngineClient


class StatusPlugin:
    """See vllm.plugins.endpoint_plugins.interface.EndpointPlugin.

    Attributes:
        name: As VLLM_PLUGINS has it.
        required_tasks: What a server must do that has a cache to compress.
    """

    name = STATUS_PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the page and the JSON behind it."""
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: Any, args: Namespace
    ) -> None:
        """Remember whom to ask."""
        state.kv_compression_source = None if engine_client is None else Source(engine_client)
