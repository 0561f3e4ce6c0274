# SPDX-License-Identifier: Apache-2.0
"""A transformers model that answers prompts under recipes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ems_vllm.config.cache_shape import CacheShape
from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.records.method import TRANSFORMERS
from ems_vllm.eval.transformers_engine.answer import Vocabulary
from ems_vllm.eval.transformers_engine.attention import IMPLEMENTATION
from ems_vllm.eval.transformers_engine.cache import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    compressed_layers,
    layer_kinds,
)
from ems_vllm.eval.transformers_engine.compaction import CompactionSettings
from ems_vllm.eval.transformers_engine.plans import (
    LevelPlan,
    level_settings,
    next_compaction,
    scored_queries,
)
from ems_vllm.eval.transformers_engine.prefill import Prefilled, PromptObserver, prefill
from ems_vllm.eval.transformers_engine.projection import output_projections
from ems_vllm.eval.transformers_engine.quantised import FORMATS, PLAIN, CacheFormat
from ems_vllm.eval.transformers_engine.request import CompressedRequest
from ems_vllm.eval.transformers_engine.rope import rotation_of
from ems_vllm.eval.transformers_engine.scored_queries import ScoredQueries
from ems_vllm.policies.policy import Policy
from ems_vllm.policies.rotation import Rotation

if TYPE_CHECKING:
    from ems_vllm.config import KVCompressionConfig, RequestOptions


class TransformersEngine:
    """Runs requests one at a time.

    Args:
        model: A decoder of full-attention layers, which are compressed, and sliding-window layers,
            which are not; loaded with attention.IMPLEMENTATION.
        block_size: Tokens per block, as the engine has it.

    Raises:
        ConfigError: the model attends in some other way.

    Attributes:
        compressed_layers: Indices of the layers that are compressed.
        scale: Softmax scale of these.
        shape: Of the cache; the layers are all that have one.
    """

    def __init__(self, model: PreTrainedModel, block_size: int = 16) -> None:
        if reason := _unsupported(model):
            raise ConfigError(
                f"model={shown(model.config.name_or_path)} has {reason}: the engine on "
                "transformers handles plain full attention, with sliding windows beside it; serve "
                "this model with vLLM."
            )
        self.model = model.eval()
        self.block_size = block_size
        self.compressed_layers = compressed_layers(model.config)
        attention: Any = model.get_decoder().layers[self.compressed_layers[0]].self_attn
        self.scale = float(attention.scaling)
        self.shape = CacheShape(
            num_layers=len(layer_kinds(model.config)),
            num_kv_heads=attention.config.num_key_value_heads,
            head_size=attention.head_dim,
            itemsize=model.dtype.itemsize,
        )

    @cached_property
    def rotation(self) -> Rotation | None:
        """RoPE of the compressed layers."""
        return rotation_of(self.model, self.compressed_layers[0])

    @classmethod
    def load(
        cls, name: str, device: str = "auto", dtype: str = "auto", block_size: int = 16
    ) -> TransformersEngine:
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

    def describe(self, name: str, compiled: bool) -> dict[str, Any]:
        """What answers depend on beside the prompt and the method, for a record of them.

        Args:
            name: Of the model.
            compiled: Whether policies use the compiled operators.
        """
        return {
            "engine": TRANSFORMERS,
            "model": name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "block_size": self.block_size,
            "operators": "compiled" if compiled else "reference",
            "versions": {name: version(name) for name in ("ems-vllm", "transformers", "torch")},
        }

    def prefill(
        self,
        token_ids: Sequence[int],
        num_queries: int,
        scored: Collection[ScoredQueries] = (ScoredQueries(),),
        cache_format: CacheFormat = FORMATS[PLAIN],
    ) -> Prefilled:
        """Process a prompt once for all requests that start with it.

        Args:
            token_ids: The prompt.
            num_queries: Last queries to keep, the largest obs_window of what follows.
            scored: The queries that score, of every plan that goes on from here.
            cache_format: In which the prompt's queries see its keys and values.
        """
        observer = PromptObserver(
            self.compressed_layers, len(token_ids), num_queries, self.scale, scored
        )
        return prefill(self.model, token_ids, observer, cache_format)

    def plans(
        self, num_tokens: int, config: KVCompressionConfig, options: RequestOptions
    ) -> list[LevelPlan]:
        """When a server with `config` would compress a prompt of `num_tokens` tokens.

        One plan for each level of layers that share the budget; one in all where all have the same.

        Raises:
            ConfigError: the allocator deals to other layers than are compressed.
        """
        heads = config.allocator.head_shares()
        return [
            LevelPlan(layers, settings.plan(num_tokens, self.block_size, options), heads)
            for layers, settings in level_settings(config, layer_kinds(self.model.config))
        ]

    def scored_queries(
        self, num_tokens: int, config: KVCompressionConfig, options: RequestOptions
    ) -> ScoredQueries | None:
        """The queries of a prompt whose attention the request needs; None for none."""
        # Before anything else: what is refused is refused before the prompt is processed.
        plans = self.plans(num_tokens, config, options)
        return (
            scored_queries(plans, config.sample_stride) if config.scorer.uses_accumulated else None
        )

    def begin(
        self,
        prompt: Prefilled,
        config: KVCompressionConfig,
        options: RequestOptions,
        cache_format: CacheFormat | None = None,
    ) -> tuple[torch.Tensor, CompressedRequest]:
        """A request as a server with `config` would begin it.

        It goes on from the prompt, unless the server compresses prompts as they come: these are
        processed for each request anew.

        Args: As of `request`.

        Returns:
            Logits after the prompt, [vocabulary], and the request.
        """
        if config.prefill_interval:
            stored_as = cache_format or prompt.cache.cache_format
            return self.process(prompt.token_ids, config, options, stored_as)
        return prompt.logits, self.request(prompt, config, options, cache_format)

    def request(
        self,
        prompt: Prefilled,
        config: KVCompressionConfig,
        options: RequestOptions,
        cache_format: CacheFormat | None = None,
    ) -> CompressedRequest:
        """A request that goes on from a prompt, compressed as a server with `config` would.

        Args:
            prompt: Processed in the format that `cache_format.prefill` names.
            config: The server's.
            options: The request's; of what is protected, ranges only.
            cache_format: Of the server's cache; None for the one of the prompt.

        Raises:
            ConfigError: the server would compress within the prompt; see `process`.
        """
        levels = self.plans(prompt.num_tokens, config, options)
        if any(level.plan.num_within_prompt for level in levels):
            raise ConfigError(
                f"prefill_interval={config.prefill_interval} compresses a prompt of "
                f"{prompt.num_tokens} tokens while it is processed, and this one has been: set it "
                "to 0, or raise it."
            )
        return self._request(prompt, levels, config, options, cache_format)

    def process(
        self,
        token_ids: Sequence[int],
        config: KVCompressionConfig,
        options: RequestOptions,
        cache_format: CacheFormat = FORMATS[PLAIN],
    ) -> tuple[torch.Tensor, CompressedRequest]:
        """Process a prompt for one request, and compress within it where the server would.

        Args:
            token_ids: The prompt.
            config: The server's.
            options: The request's; of what is protected, ranges only.
            cache_format: Of the server's cache.

        Returns:
            Logits after the prompt, [vocabulary], and the request.
        """
        levels = self.plans(len(token_ids), config, options)
        scored = self.scored_queries(len(token_ids), config, options)
        within = any(level.plan.num_within_prompt for level in levels)
        num_first = next_compaction(levels, 0) if within else None
        needed = [] if scored is None else [scored]
        seen_as = FORMATS[cache_format.prefill]
        prompt = self.prefill(token_ids[:num_first], config.obs_window, needed, seen_as)
        request = self._request(prompt, levels, config, options, cache_format)
        rest = token_ids[prompt.num_tokens :]
        return request.extend(rest)[-1] if rest else prompt.logits, request

    def _request(
        self,
        prompt: Prefilled,
        levels: Sequence[LevelPlan],
        config: KVCompressionConfig,
        options: RequestOptions,
        cache_format: CacheFormat | None,
    ) -> CompressedRequest:
        policy = Policy.from_config(config)
        protected = options.protect.ranges if options.protect else ()
        reads_weights = policy.selector.reads_output_weights
        settings = CompactionSettings(
            policy=policy,
            obs_window=config.obs_window,
            sample_stride=config.sample_stride,
            scale=self.scale,
            rotation=self.rotation,
            protected=protected,
            output_weights=self._output_weights() if reads_weights else {},
        )
        stored_as = cache_format or prompt.cache.cache_format
        return CompressedRequest(self.model, settings, levels, prompt, stored_as)

    def _output_weights(self) -> dict[int, torch.Tensor]:
        found = output_projections(
            self.model, self.compressed_layers, "choose another selector, as top_k"
        )
        weights = [projection.weight for projection in found]
        return dict(zip(self.compressed_layers, weights, strict=True))


def _unsupported(model: PreTrainedModel) -> str | None:
    """What of a model's attention the engine would get wrong."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds = layer_kinds(config)
    if others := set(kinds) - {FULL_ATTENTION, SLIDING_ATTENTION}:
        return f"layers of kind {', '.join(sorted(others))}"
    if len(kinds) < config.num_hidden_layers:
        return "layers that share the cache of others"
    if getattr(config, "attn_logit_softcapping", None):
        return "soft-capped attention logits"
    # Attention sinks, for one, are nothing that torch's attention knows.
    if not model._supports_sdpa:
        return "an attention that transformers does not compute with torch's own"
    if FULL_ATTENTION not in kinds:
        return f"no layer but of kind {SLIDING_ATTENTION}, so nothing to compress"
    return None


def load_vocabulary(name: str, model: PreTrainedModel) -> Vocabulary:
    """Tokenizer of a model folder, as far as answers need it."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(configured if isinstance(configured, list) else [configured])}

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

    return Vocabulary(decode, (ends | {tokenizer.eos_token_id}) - {None})
