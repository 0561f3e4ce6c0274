# SPDX-License-Identifier: Apache-2.0
"""Wraps an attention backend: live columns go in, queries are observed on the way out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ems_vllm.engine.attention.head_rows import LAYOUT, MOST_GRAPHS, LayerRows, reads_by_head

if TYPE_CHECKING:
    import torch
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionCGSupport,
        CommonAttentionMetadata,
    )
    from vllm.v1.kv_cache_interface import KVCacheLayout

    from ems_vllm.engine.attention.bindings import MetadataRewriter, QueryObserver


def wrap_backend(
    base: type[AttentionBackend], module: str, impl_cls: type[Any] | None = None
) -> type[AttentionBackend]:
    """A subclass of `base` that keeps its name and kernels.

    Until a binding is set (profiling before the cache exists, layers that are not compressed) the
    wrapped classes do exactly what their bases do.

    Args:
        base: Backend of vLLM or of this package's CPU platform.
        module: Name of the module in which the result is defined.
        impl_cls: Implementation to wrap instead of the backend's own.
    """
    name = f"Compressed{base.__name__}"
    impl = _wrap_impl(impl_cls or base.get_impl_cls(), module)
    builder = _wrap_builder(base.get_builder_cls(), module)

    def layouts(cls: type[AttentionBackend]) -> tuple[KVCacheLayout, ...] | None:
        return (LAYOUT,) if reads_by_head() else base.supported_kv_cache_layouts()

    return type(
        name,
        (base,),
        {
            "__module__": module,
            "__doc__": f"{base.__name__} over compressed KV caches.",
            "get_impl_cls": staticmethod(lambda: impl),
            "get_builder_cls": staticmethod(lambda: builder),
            "supported_kv_cache_layouts": classmethod(layouts),
        },
    )


def _wrap_builder(base: type[Any], module: str) -> type[Any]:
    class CompressedBuilder(base):
        # A table swapped into finished metadata would bypass the rewrite.
        supports_update_block_table: ClassVar[bool] = False
        compression: MetadataRewriter | None = None

        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
            support = super().get_cudagraph_support(*args, **kwargs)
            if not reads_by_head():
                return support
            return min(support, MOST_GRAPHS, key=lambda support: support.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if self.compression is not None:
                common_attn_metadata = self.compression.rewrite(common_attn_metadata)
            return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)

    return _named(CompressedBuilder, base, module)


def _wrap_impl(base: type[Any], module: str) -> type[Any]:
    class CompressedImpl(base):
        compression: QueryObserver | None = None
        # Where kv_heads hold different numbers of entries.
        head_rows: LayerRows | None = None
        # An implementation that can, keeps the log of its softmax denominators here when asked to.
        keep_softmax_lse = False
        softmax_lse: torch.Tensor | None = None

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            # No metadata: a profiling run, whose cache holds nothing.
            if self.compression is None or attn_metadata is None:
                self.keep_softmax_lse = False
                return super().forward(
                    layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
                )
            rows = self.head_rows
            impl = self if rows is None else rows.impl
            impl.keep_softmax_lse = self.compression.scores_queries
            attend = super().forward if rows is None else partial(rows.attend, base.forward)
            result = attend(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
            lse, impl.softmax_lse = impl.softmax_lse, None
            if rows is not None and lse is not None:
                lse = rows.of_tokens(lse)
            self.compression.observe(query, kv_cache, lse)
            return result

    return _named(CompressedImpl, base, module)


def _named(cls: type[Any], base: type[Any], module: str) -> type[Any]:
    cls.__name__ = cls.__qualname__ = f"Compressed{base.__name__}"
    cls.__module__ = module
    cls.__doc__ = base.__doc__
    return cls
