# SPDX-License-Identifier: Apache-2.0
"""A transformers model that answers prompts under recipes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.reference.answer import Vocabulary
from ems_vllm.eval.reference.attention import IMPLEMENTATION
from ems_vllm.eval.reference.prefill import Prefilled, prefill
from ems_vllm.eval.reference.request import ReferenceRequest, RequestSettings
from ems_vllm.policies.policy import Policy

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan
    from ems_vllm.config import KVCompressionConfig, RequestOptions


class ReferenceModel:
    """Runs requests one at a time.

    Args:
        model: A decoder with plain full attention in every layer, loaded with
            attention.IMPLEMENTATION.
        block_size: Tokens per block, as the engine has it.

    Raises:
        ConfigError: a layer does not attend to everything before it.
    """

    def __init__(self, model: PreTrainedModel, block_size: int = 16) -> None:
        kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            raise ConfigError(
                f"model={shown(model.config.name_or_path)} has layers of kind "
                f"{', '.join(sorted(kinds))}: the reference handles full attention only."
            )
        self.model = model.eval()
        self.block_size = block_size
        attention: Any = model.get_decoder().layers[0].self_attn
        self.scale = float(attention.scaling)

    @classmethod
    def load(
        cls, name: str, device: str = "auto", dtype: str = "auto", block_size: int = 16
    ) -> ReferenceModel:
        """Load a model folder; "auto" is the GPU where there is one, and the model's dtype."""
        disable_progress_bar()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=IMPLEMENTATION,
        )
        return cls(model.to(device), block_size)

    def prefill(
        self, token_ids: Sequence[int], num_queries: int, first_queries: Collection[int] = (0,)
    ) -> Prefilled:
        """Process a prompt once for all requests that start with it; see prefill.prefill."""
        return prefill(self.model, token_ids, num_queries, self.scale, first_queries)

    def plan(
        self, num_tokens: int, config: KVCompressionConfig, options: RequestOptions
    ) -> CompressionPlan:
        """When a server with `config` would compress a prompt of `num_tokens` tokens."""
        settings = config.allocator.settings(config.plan_settings)
        return settings.plan(num_tokens, self.block_size, options)

    def request(
        self, prompt: Prefilled, config: KVCompressionConfig, options: RequestOptions
    ) -> ReferenceRequest:
        """A request that goes on from a prompt, compressed as a server with `config` would."""
        plan = self.plan(prompt.num_tokens, config, options)
        policy = Policy.from_config(config)
        return ReferenceRequest(
            self.model, RequestSettings(plan, policy, config.obs_window, self.scale), prompt
        )


def load_vocabulary(name: str, model: PreTrainedModel) -> Vocabulary:
    """Tokenizer of a model folder, as far as answers need it."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(configured if isinstance(configured, list) else [configured])}

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

    return Vocabulary(decode, (ends | {tokenizer.eos_token_id}) - {None})
