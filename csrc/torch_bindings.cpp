// SPDX-License-Identifier: Apache-2.0

// Schemas of torch.ops.ems_vllm and their implementations. The shapes are in ems/params.h.

#include <torch/csrc/stable/library.h>

#include "ops.h"

// The tests register the same operators under another name, over the emulated CUDA kernels.
#ifndef EMS_LIBRARY
#define EMS_LIBRARY ems_vllm
#endif
// One more level, so that the name is expanded before torch's macros paste it.
#define EMS_TORCH_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define EMS_TORCH_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

EMS_TORCH_LIBRARY(EMS_LIBRARY, m) {
  // Adds the attention a batch of queries pays to every key to paged scores.
  m.def(
      "score_queries(Tensor query, Tensor key_cache, Tensor block_table, Tensor query_starts, "
      "Tensor query_lens, Tensor seq_lens, Tensor accumulate_lens, Tensor score_table, "
      "Tensor? lse, float scale, int sample_stride, Tensor(a!) scores) -> ()");

  // Scores entries by the attention of the last queries.
  m.def(
      "score_window(Tensor ring, Tensor ring_rows, Tensor num_queries, Tensor end_positions, "
      "Tensor key_cache, Tensor block_table, Tensor live_lens, Tensor num_entries, float scale, "
      "Tensor(a!) scores, Tensor? key_scales=None, Tensor(b!)? peaks=None) -> ()");

  // Copies queries into the ring of the last queries.
  m.def("record_queries(Tensor query, Tensor ring_slots, Tensor(a!) ring) -> ()");

  // Weighs entries by their ranks in one of several orders.
  m.def(
      "rank_entries(Tensor scores, Tensor num_entries, Tensor num_protected, "
      "Tensor? is_protected, float share, int first, Tensor(a!) weights) -> ()");

  // Splits the entries of every kv_head into kept, to be merged, and dropped.
  m.def(
      "select_entries(Tensor scores, Tensor num_entries, Tensor budgets, Tensor num_protected, "
      "Tensor merge_limits, float mass_limit, Tensor(a!) kept_idx, Tensor(b!) merge_idx) -> ()");

  // Finds the kept entry that an entry to be merged is most redundant with.
  m.def(
      "assign_classes(Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor kept_idx, "
      "Tensor merge_idx, Tensor budgets, Tensor num_protected, float similarity_threshold, "
      "Tensor(a!) class_idx) -> ()");

  // Merges every class and writes it to the target columns.
  m.def(
      "merge_compact(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!)? accumulated_pages, "
      "Tensor weights, Tensor? carry, int key_merge, bool sums_values, Tensor? mass_keys, "
      "Tensor block_table, "
      "Tensor kept_idx, Tensor merge_idx, Tensor class_idx, Tensor budgets, Tensor target_columns, "
      "int rows_together=1) -> ()");

  // Shifts block tables and sequence lengths past the columns that were given back.
  m.def(
      "shift_block_tables(Tensor block_table, Tensor seq_lens, Tensor first_columns, int "
      "block_size, "
      "Tensor(a!) out_block_table, Tensor(b!) out_seq_lens) -> ()");

  // Gives every kv_head of every request a block table of the pages that it owns.
  m.def(
      "head_pages(Tensor block_table, Tensor seq_lens, Tensor places, Tensor page_starts, "
      "int block_size, Tensor(a!) out_block_table, Tensor(b!) out_seq_lens) -> ()");

  // Measures the lengths of entries' keys or values.
  m.def(
      "vector_norms(Tensor cache, Tensor block_table, Tensor num_entries, Tensor(a!) norms) -> ()");

  // Sums the directions of entries' keys, and what makes them correlate before RoPE.
  m.def(
      "key_moments(Tensor key_cache, Tensor block_table, Tensor num_entries, Tensor? cos_sin, "
      "bool is_neox, Tensor(a!) directions, Tensor(b!)? means=None, Tensor(c!)? products=None) "
      "-> ()");

  // Scores entries by how little their keys resemble the others.
  m.def(
      "key_scores(Tensor key_cache, Tensor block_table, Tensor num_entries, Tensor? cos_sin, "
      "bool is_neox, Tensor directions, Tensor(a!) distinctness, Tensor? means=None, "
      "Tensor? whitening=None, Tensor(b!)? leverage=None) -> ()");
}

namespace {

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("score_queries", TORCH_BOX(&ems::score_queries));
  m.impl("score_window", TORCH_BOX(&ems::score_window));
  m.impl("record_queries", TORCH_BOX(&ems::record_queries));
  m.impl("rank_entries", TORCH_BOX(&ems::rank_entries));
  m.impl("select_entries", TORCH_BOX(&ems::select_entries));
  m.impl("assign_classes", TORCH_BOX(&ems::assign_classes));
  m.impl("merge_compact", TORCH_BOX(&ems::merge_compact));
  m.impl("shift_block_tables", TORCH_BOX(&ems::shift_block_tables));
  m.impl("head_pages", TORCH_BOX(&ems::head_pages));
  m.impl("vector_norms", TORCH_BOX(&ems::vector_norms));
  m.impl("key_moments", TORCH_BOX(&ems::key_moments));
  m.impl("key_scores", TORCH_BOX(&ems::key_scores));
}

}  // namespace

EMS_TORCH_LIBRARY_IMPL(EMS_LIBRARY, CPU, m) { implement(m); }

#if EMS_WITH_CUDA
EMS_TORCH_LIBRARY_IMPL(EMS_LIBRARY, CUDA, m) { implement(m); }
#endif
