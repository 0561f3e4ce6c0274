# SPDX-License-Identifier: Apache-2.0
"""InputProcessor: refuse bad `vllm_xargs` where that becomes an HTTP 400."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.patches.record import Patch

if TYPE_CHECKING:
    from vllm.v1.engine.input_processor import InputProcessor


def _wrap_validate_params(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_params(self: InputProcessor, params: Any, *args: Any, **kwargs: Any) -> Any:
        from ems_vllm.engine.request_check import check_request

        check_request(self.vllm_config, params)
        return original(self, params, *args, **kwargs)

    return _validate_params


PATCHES = (
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor._validate_params",
        wrap=_wrap_validate_params,
        vllm=">=0.32.0,<0.33",
        source_sha256={
            "0.32.0": "656325c2c4138dbdaaa2cc977b30f4e282449481a2d9ba9f0f170b54e65194a6"
        },
        reason=(
            "Only a platform (validate_request) or a logits processor (validate_params) may check "
            "a request's extra arguments before the engine sees it; we are neither on CUDA."
        ),
        remove_when="general plugins can validate requests",
    ),
)
