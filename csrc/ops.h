// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

// The operators as torch calls them: each checks its tensors, fills the params struct and launches
// the kernel of the device. Shapes are in ems/params.h.
namespace ems {

using torch::stable::Tensor;

void score_queries(const Tensor& query, const Tensor& key_cache, const Tensor& block_table,
                   const Tensor& query_starts, const Tensor& query_lens, const Tensor& seq_lens,
                   const Tensor& accumulate_lens, const Tensor& score_table,
                   const std::optional<Tensor>& lse, double scale, int64_t sample_stride,
                   const Tensor& scores);

void score_window(const Tensor& ring, const Tensor& ring_rows, const Tensor& num_queries,
                  const Tensor& end_positions, const Tensor& key_cache, const Tensor& block_table,
                  const Tensor& live_lens, const Tensor& num_entries, double scale,
                  const Tensor& scores, const std::optional<Tensor>& key_scales,
                  const std::optional<Tensor>& peaks);

void record_queries(const Tensor& query, const Tensor& ring_slots, const Tensor& ring);

void rank_entries(const Tensor& scores, const Tensor& num_entries, const Tensor& num_protected,
                  const std::optional<Tensor>& is_protected, double share, int64_t first,
                  const Tensor& weights);

void select_entries(const Tensor& scores, const Tensor& num_entries, const Tensor& budgets,
                    const Tensor& num_protected, const Tensor& merge_limits, double mass_limit,
                    const Tensor& kept_idx, const Tensor& merge_idx);

void assign_classes(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                    const Tensor& kept_idx, const Tensor& merge_idx, const Tensor& budgets,
                    const Tensor& num_protected, double similarity_threshold,
                    const Tensor& class_idx);

void merge_compact(const Tensor& key_cache, const Tensor& value_cache,
                   const std::optional<Tensor>& accumulated_pages, const Tensor& weights,
                   const std::optional<Tensor>& carry, int64_t key_merge, bool sums_values,
                   const std::optional<Tensor>& mass_keys, const Tensor& block_table,
                   const Tensor& kept_idx, const Tensor& merge_idx, const Tensor& class_idx,
                   const Tensor& budgets, const Tensor& target_columns, int64_t rows_together);

void shift_block_tables(const Tensor& block_table, const Tensor& seq_lens,
                        const Tensor& first_columns, int64_t block_size,
                        const Tensor& out_block_table, const Tensor& out_seq_lens);

void head_pages(const Tensor& block_table, const Tensor& seq_lens, const Tensor& places,
                const Tensor& page_starts, int64_t block_size, const Tensor& out_block_table,
                const Tensor& out_seq_lens);

void vector_norms(const Tensor& cache, const Tensor& block_table, const Tensor& num_entries,
                  const Tensor& norms);

void key_moments(const Tensor& key_cache, const Tensor& block_table, const Tensor& num_entries,
                 const std::optional<Tensor>& cos_sin, bool is_neox, const Tensor& directions,
                 const std::optional<Tensor>& means, const std::optional<Tensor>& products);

void key_scores(const Tensor& key_cache, const Tensor& block_table, const Tensor& num_entries,
                const std::optional<Tensor>& cos_sin, bool is_neox, const Tensor& directions,
                const Tensor& distinctness, const std::optional<Tensor>& means,
                const std::optional<Tensor>& whitening, const std::optional<Tensor>& leverage);

}  // namespace ems
