# SPDX-License-Identifier: Apache-2.0
"""Attention over vLLM's paged KV cache in plain PyTorch."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig
from vllm.config.cache import CacheDType
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from ems_vllm.cpu_platform.attention_calls import AttentionCall, BatchShape, cut_into_calls
from ems_vllm.vllm_versions import is_quantized_kv_cache


class TorchCPUBackend(AttentionBackend):
    """Decoder self-attention (MHA, GQA, MQA), any block size, any KV-cache layout."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]

    @staticmethod
    def get_name() -> str:
        return "TORCH_CPU"

    @staticmethod
    def get_impl_cls() -> type["TorchCPUImpl"]:
        return TorchCPUImpl

    @staticmethod
    def get_builder_cls() -> type["TorchCPUBuilder"]:
        return TorchCPUBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True


@dataclass
class TorchCPUMetadata(AttentionMetadata):
    """One batch, and how it is cut into calls for each sliding window its layers use.

    Attributes:
        query_start_loc: [num_reqs + 1], int32.
        seq_lens: [num_reqs], int32.
        block_table: [num_reqs, max_num_blocks_per_req], int32.
        slot_mapping: [num_actual_tokens], int64.
    """

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    batch: BatchShape
    dtype: torch.dtype
    _calls: dict[int | None, list[AttentionCall]] = field(default_factory=dict, repr=False)

    def calls(self, sliding_window: int | None) -> list[AttentionCall]:
        """The batch's calls; planned by the first layer that asks, shared by the others."""
        if sliding_window not in self._calls:
            self._calls[sliding_window] = cut_into_calls(self.batch, sliding_window, self.dtype)
        return self._calls[sliding_window]


class TorchCPUBuilder(AttentionMetadataBuilder[TorchCPUMetadata]):
    """Copies what the attention needs out of the batch's common metadata."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.dtype = vllm_config.model_config.dtype

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TorchCPUMetadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError("TORCH_CPU attention is causal only")
        if m.mm_req_doc_ranges:
            raise NotImplementedError(
                "TORCH_CPU attention is causal only; this model's image tokens see each other"
            )
        batch = BatchShape(
            query_start_loc=m.query_start_loc_cpu.tolist(),
            seq_lens=m.seq_lens.tolist(),
            block_table=m.block_table_tensor,
            block_size=self.block_size,
        )
        return TorchCPUMetadata(
            num_actual_tokens=m.num_actual_tokens,
            query_start_loc=m.query_start_loc_cpu,
            seq_lens=m.seq_lens,
            block_table=m.block_table_tensor,
            slot_mapping=m.slot_mapping,
            batch=batch,
            dtype=self.dtype,
        )


class TorchCPUImpl(AttentionImpl[TorchCPUMetadata]):
    """scaled_dot_product_attention over K/V gathered from the paged cache.

    Attributes:
        keep_softmax_lse: Whether `forward` keeps the log of its softmax denominators.
        softmax_lse: [num_tokens, num_heads], float32 - what it kept, attention sinks left out.
    """

    keep_softmax_lse = False
    softmax_lse: torch.Tensor | None = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        _refuse("ALiBi", alibi_slopes)
        _refuse("attention type", attn_type if attn_type != AttentionType.DECODER else None)
        supported = TorchCPUBackend.supports_kv_cache_dtype(kv_cache_dtype)
        _refuse("KV-cache dtype", None if supported else kv_cache_dtype)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.num_queries_per_kv = num_heads // self.num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.has_float8_cache = is_quantized_kv_cache(kv_cache_dtype)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        # 0 means none, as in vLLM's other backends.
        self.logits_soft_cap = logits_soft_cap or None
        self.sinks = sinks

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write K/V of new tokens into their slots.

        Args:
            key: [num_tokens, num_kv_heads, head_size]; value likewise. Rows beyond the slot
                mapping are padding, as are tokens whose slot is -1.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size]; written. A float8 cache
                is one of bytes, uint8.
            slot_mapping: [num_slots], int64.
        """
        num_slots = slot_mapping.shape[0]
        key, value = key[:num_slots], value[:num_slots]
        written = slot_mapping >= 0
        if not written.all():
            key, value, slot_mapping = key[written], value[written], slot_mapping[written]
        if self.has_float8_cache:
            key = _float8_bytes(key, layer._k_scale_float)
            value = _float8_bytes(value, layer._v_scale_float)
        block_size = kv_cache.shape[2]
        block_ids, block_offsets = slot_mapping // block_size, slot_mapping % block_size
        k_cache, v_cache = kv_cache.split(self.head_size, dim=-1)
        k_cache[block_ids, :, block_offsets] = key.to(kv_cache.dtype)
        v_cache[block_ids, :, block_offsets] = value.to(kv_cache.dtype)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TorchCPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the cache, which already holds this step's K/V.

        Args:
            query: [num_tokens, num_heads, head_size].
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any strides.
            attn_metadata: None in a profiling run.
            output: [num_tokens, num_heads, head_size] or the last two flattened; written.
        """
        if attn_metadata is None:
            return output.fill_(0)
        grouped = (-1, self.num_kv_heads, self.num_queries_per_kv, self.head_size)
        query, out = query.view(grouped), output.view(grouped)
        lse = None
        if self.keep_softmax_lse:
            lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        for call in attn_metadata.calls(self.sliding_window):
            out[call.tokens], call_lse = self._attend(layer, query[call.tokens], kv_cache, call)
            if lse is not None and call_lse is not None:
                lse[call.tokens] = call_lse
        self.softmax_lse = None if lse is None else lse.flatten(1)
        return output

    def _attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        call: AttentionCall,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call.

        Args:
            query: [tokens, num_kv_heads, num_queries_per_kv, head_size].

        Returns:
            Output, shaped as the query; the log of its softmax denominators, less the last
            dimension, or None where nobody asked.
        """
        kv = call.entries.copy_from(kv_cache)
        if self.has_float8_cache:
            kv = kv.view(torch.float8_e4m3fn)
        k, v = kv.to(query.dtype).split(self.head_size, dim=-1)
        if self.has_float8_cache:
            k, v = k * layer._k_scale_float, v * layer._v_scale_float
        if call.query_len == 1:
            # The queries of a group are the rows of one small attention: K/V is read once.
            return self._sdpa(query, k, v, call)
        # One request: kv heads are the batch, and strides of 0 repeat K/V for the group.
        shape = (-1, self.num_queries_per_kv, -1, -1)
        k, v = k[0, :, None].expand(shape), v[0, :, None].expand(shape)
        out, lse = self._sdpa(query.permute(1, 2, 0, 3), k, v, call)
        return out.permute(2, 0, 1, 3), None if lse is None else lse.permute(2, 0, 1)

    def _sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        keeps_lse = self.keep_softmax_lse or self.sinks is not None
        if not keeps_lse and self.logits_soft_cap is None:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=call.mask, is_causal=call.is_causal, scale=self.scale
            )
            return out, None
        if self.logits_soft_cap is None:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, attn_mask=call.mask, is_causal=call.is_causal, scale=self.scale
            )
        else:
            logits = (q.float() @ k.float().transpose(-1, -2)) * self.scale
            out, lse = _soft_capped(logits, v, call, self.logits_soft_cap)
        if self.sinks is None:
            return out, lse
        # A sink adds exp(sink) to the softmax's denominator, which is exp(lse) without it.
        sinks = self.sinks.view(self.num_kv_heads, self.num_queries_per_kv)
        if call.query_len > 1:
            sinks = sinks[..., None]
        return out * torch.sigmoid(lse - sinks)[..., None].to(out.dtype), lse


def _soft_capped(
    logits: torch.Tensor, v: torch.Tensor, call: AttentionCall, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with logits cap * tanh(logit / cap), and the log of its denominators."""
    logits = torch.tanh(logits / cap) * cap
    if call.mask is not None:
        logits += call.mask
    elif call.is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits.masked_fill_(future, float("-inf"))
    lse = logits.logsumexp(-1)
    return ((logits - lse[..., None]).exp() @ v.float()).to(v.dtype), lse


def _float8_bytes(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x / scale as float8 e4m3, what is too large for it saturated; uint8, same shape."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scaled = (x.float() / scale).clamp(-largest, largest)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def _refuse(what: str, value: Any) -> None:
    if value:
        raise NotImplementedError(f"TORCH_CPU attention does not support {what} {value}")
