# SPDX-License-Identifier: Apache-2.0
"""RequestState: every output of a sequence says what the sequence holds in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.patches.record import Patch, Process
from ems_vllm.vllm_versions import by_version

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import RequestState


def _wrap_make_request_output(original: Callable[..., Any]) -> Callable[..., Any]:
    from ems_vllm.engine.frontend.holdings import note_holding, show_holdings
    from ems_vllm.engine.holding import holding_of

    def make_request_output(
        self: RequestState,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        holding = holding_of(kv_transfer_params)
        note_holding(self, holding)
        # Another engine of this process may have a connector.
        params = kv_transfer_params if holding is None else None
        output = original(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, params, *args, **kwargs
        )
        if output is not None and pooling_output is None:
            show_holdings(self, output)
        return output

    return make_request_output


PATCHES = (
    Patch(
        target="vllm.v1.engine.output_processor:RequestState.make_request_output",
        wrap=_wrap_make_request_output,
        source_sha256=by_version(
            "353cb96c5deaa3077e99e21bb8a747d2e026c90edce586f7bd5868fe1056a170",
            "9c555c51b1a2ece2c4989cae207071eb748b3b8a211456951b56304b90155478",
        ),
        process=Process.FRONTEND,
        reason=(
            "What the scheduler tells of a request reaches the frontend with a KV connector's "
            "parameters, and is lost there when outputs are merged or not the last."
        ),
        upstream="none filed",
        remove_when="outputs of the engine core carry something of extensions to RequestOutput",
    ),
)
