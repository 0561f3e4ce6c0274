# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.endpoint_plugins`: what vLLM attaches to its API server."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm import envs

from ems_vllm.engine.status.routes import router
from ems_vllm.engine.status.source import Source
from ems_vllm.keys import STATUS_PLUGIN

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from vllm.engine.protocol import EngineClient


# A child of vLLM's logger, so that its settings apply.
logger = logging.getLogger("vllm.ems")


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
        """Remember whom to ask, and whose pages may: those that are named, "*" names none."""
        state.kv_compression_origins = frozenset(args.allowed_origins)
        source = None if engine_client is None else Source(engine_client)
        state.kv_compression_source = source
        if source is not None and source.shows_text and not (args.api_key or envs.VLLM_API_KEY):
            logger.warning(
                "kv_compression_config.inspect_text=True on a server without --api-key: whoever "
                "reaches it reads the prompts of its latest requests."
            )
