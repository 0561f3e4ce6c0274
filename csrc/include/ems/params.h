// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/dtype.h"
#include "ems/paged_kv.h"
#include "ems/rotation.h"

// Arguments of every operator, checked and without torch types. What they mean is documented at the
// public function of the same name in ems_vllm/ops/__init__.py.
namespace ems {

struct ScoreQueriesParams {
  DType dtype;        // of query
  DType cache_dtype;  // of key_cache
  int64_t num_rows;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_size;
  float scale;
  TokenHeads query;                // [num_tokens, num_heads, head_size] dtype
  PagedTensor key_cache;           // [num_blocks, num_kv_heads, block_size, head_size] cache_dtype
  BlockTable block_table;          // [num_rows, num_columns] int32
  const int32_t* query_starts;     // [num_rows] int32
  const int32_t* query_lens;       // [num_rows] int32
  const int32_t* seq_lens;         // [num_rows] int32
  const int32_t* accumulate_lens;  // [num_rows] int32
  BlockTable score_table;          // [num_rows, num_score_columns] int32
  int64_t sample_stride;           // one query position in so many scores
  const float* lse;                // [num_tokens, num_heads] float32, may be nullptr
  int64_t lse_token_stride;
  int64_t lse_head_stride;
  PagedTensor scores;  // [num_pages, num_kv_heads, block_size] float32
};

struct ScoreWindowParams {
  DType dtype;        // of ring
  DType cache_dtype;  // of key_cache
  int64_t num_layers;
  int64_t num_rows;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_size;
  float scale;
  QueryRing ring;                // [num_layers, num_ring_rows, window, num_heads, head_size] dtype
  const int32_t* ring_rows;      // [num_rows] int32
  const int32_t* num_queries;    // [num_rows] int32
  const int32_t* end_positions;  // [num_rows] int32
  // [num_layers, num_blocks, num_kv_heads, block_size, head_size] cache_dtype
  PagedTensor key_cache;
  BlockTable block_table;      // [num_rows, num_columns] int32
  const int32_t* live_lens;    // [num_rows] int32
  const int32_t* num_entries;  // [num_rows] int32
  const float* key_scales;     // [num_layers] float32, nullable
  HeadRows<float> scores;      // [num_layers, num_rows, num_kv_heads, max_entries] float32
  HeadRows<float> peaks;       // like scores; its data is nullable
};

struct RecordQueriesParams {
  DType dtype;  // of query and ring
  int64_t num_tokens;
  int64_t num_heads;
  int64_t head_size;
  TokenHeads query;           // [num_tokens, num_heads, head_size] dtype
  const int64_t* ring_slots;  // [num_tokens] int64
  QueryRing ring;             // [1, num_ring_rows, window, num_heads, head_size] dtype
};

struct SelectEntriesParams {
  int64_t num_layers;
  int64_t num_rows;
  int64_t num_kv_heads;
  double mass_limit;
  HeadRows<const float> scores;  // [num_layers, num_rows, num_kv_heads, max_entries] float32
  const int32_t* num_entries;    // [num_rows] int32
  const int32_t* budgets;        // [num_rows] int32
  const int32_t* num_protected;  // [num_rows] int32
  const int32_t* merge_limits;   // [num_rows] int32
  HeadRows<int32_t> kept_idx;    // [num_layers, num_rows, num_kv_heads, max_budget] int32
  HeadRows<int32_t> merge_idx;   // [num_layers, num_rows, num_kv_heads, max_merges] int32
};

struct RankEntriesParams {
  int64_t num_layers;
  int64_t num_rows;
  int64_t num_kv_heads;
  float share;
  float first;                        // a whole number
  HeadRows<const float> scores;       // [num_layers, num_rows, num_kv_heads, max_entries] float32
  const int32_t* num_entries;         // [num_rows] int32
  const int32_t* num_protected;       // [num_rows] int32
  HeadRows<const bool> is_protected;  // like scores, bool; its data is nullable
  HeadRows<float> weights;            // [num_layers, num_rows, num_kv_heads, max_entries] float32
};

struct AssignClassesParams {
  DType dtype;  // of both caches
  int64_t num_layers;
  int64_t num_rows;
  int64_t num_kv_heads;
  int64_t head_size;
  float similarity_threshold;
  PagedTensor key_cache;    // [num_layers, num_blocks, num_kv_heads, block_size, head_size] dtype
  PagedTensor value_cache;  // [num_layers, num_blocks, num_kv_heads, block_size, head_size] dtype
  BlockTable block_table;   // [num_rows, num_columns] int32
  HeadRows<const int32_t> kept_idx;   // [num_layers, num_rows, num_kv_heads, max_budget] int32
  HeadRows<const int32_t> merge_idx;  // [num_layers, num_rows, num_kv_heads, max_merges] int32
  const int32_t* budgets;             // [num_rows] int32
  const int32_t* num_protected;       // [num_rows] int32
  HeadRows<int32_t> class_idx;        // [num_layers, num_rows, num_kv_heads, max_merges] int32
};

// What the key of a class is made of, before mass is added.
enum class KeyMerge : int32_t {
  kCentre = 0,     // the centre's alone
  kDirection = 1,  // directions of all, weighted; the centre's norm
  kMean = 2,       // weighted mean
};

struct MergeCompactParams {
  DType dtype;  // of both caches
  int64_t num_layers;
  int64_t num_rows;
  int64_t num_kv_heads;
  int64_t head_size;
  PagedTensor key_cache;    // [num_layers, num_blocks, num_kv_heads, block_size, head_size] dtype
  PagedTensor value_cache;  // [num_layers, num_blocks, num_kv_heads, block_size, head_size] dtype
  PagedTensor
      accumulated_pages;  // [num_layers, num_pages, num_kv_heads, block_size] float32, nullable
  HeadRows<const float> weights;  // [num_layers, num_rows, num_kv_heads, max_entries] float32
  HeadRows<const float>
      carry;           // [num_layers, num_rows, num_kv_heads, max_entries] float32, nullable
  KeyMerge key_merge;  // what becomes of a class's keys
  bool sums_values;    // the values of members are added, by their weight over the centre's
  HeadRows<const float>
      mass_keys;           // [num_layers, num_rows, num_kv_heads, head_size] float32, nullable
  BlockTable block_table;  // [num_rows, num_columns] int32
  HeadRows<const int32_t> kept_idx;   // [num_layers, num_rows, num_kv_heads, max_budget] int32
  HeadRows<const int32_t> merge_idx;  // [num_layers, num_rows, num_kv_heads, max_merges] int32
  HeadRows<const int32_t> class_idx;  // [num_layers, num_rows, num_kv_heads, max_merges] int32
  const int32_t* budgets;             // [num_rows] int32
  const int32_t* target_columns;      // [num_rows] int32
  int64_t rows_together;              // rows of a group, which share blocks; divides num_rows
};

struct ShiftBlockTablesParams {
  int64_t num_rows;
  int64_t block_size;
  BlockTable block_table;        // [num_rows, num_columns] int32
  const int32_t* seq_lens;       // [num_rows] int32
  const int32_t* first_columns;  // [num_rows] int32
  int32_t* out_block_table;      // [num_rows, num_columns] int32
  int64_t out_row_stride;
  int32_t* out_seq_lens;  // [num_rows] int32
};

struct HeadPagesParams {
  int64_t num_rows;
  int64_t num_places;
  int64_t num_kv_heads;
  int64_t block_size;
  BlockTable block_table;      // [num_rows, num_columns] int32
  const int32_t* seq_lens;     // [num_rows] int32
  const int32_t* places;       // [num_rows] int32
  const int32_t* page_starts;  // [num_places, num_kv_heads + 1] int32
  int64_t place_stride;
  int32_t* out_block_table;  // [num_rows * num_kv_heads, num_out_columns] int32
  int64_t num_out_columns;
  int64_t out_row_stride;
  int32_t* out_seq_lens;  // [num_rows * num_kv_heads] int32
};

struct VectorNormsParams {
  DType dtype;  // of the cache
  int64_t num_layers;
  int64_t num_rows;
  int64_t num_kv_heads;
  int64_t head_size;
  PagedTensor cache;       // [num_layers, num_blocks, num_kv_heads, block_size, head_size] dtype
  BlockTable block_table;  // [num_rows, num_columns] int32
  const int32_t* num_entries;  // [num_rows] int32
  HeadRows<float> norms;       // [num_layers, num_rows, num_kv_heads, max_entries] float32
};

struct KeyMomentsParams {
  DType dtype;  // of the cache
  int64_t num_layers;
  int64_t num_rows;
  int64_t num_kv_heads;
  int64_t head_size;
  PagedTensor key_cache;   // [num_layers, num_blocks, num_kv_heads, block_size, head_size] dtype
  BlockTable block_table;  // [num_rows, num_columns] int32
  const int32_t* num_entries;  // [num_rows] int32
  KeyRotation rotation;        // of all layers
  HeadRows<float> directions;  // [num_layers, num_rows, num_kv_heads, head_size] float32
  HeadRows<float> means;       // like directions; its data is nullable
  // [num_layers, num_rows, num_kv_heads, head_size, head_size] float32; nullable as means are
  HeadRows<float> products;
};

struct KeyScoresParams {
  DType dtype;  // of the cache
  int64_t num_layers;
  int64_t num_rows;
  int64_t num_kv_heads;
  int64_t head_size;
  PagedTensor key_cache;   // [num_layers, num_blocks, num_kv_heads, block_size, head_size] dtype
  BlockTable block_table;  // [num_rows, num_columns] int32
  const int32_t* num_entries;        // [num_rows] int32
  KeyRotation rotation;              // of all layers
  HeadRows<const float> directions;  // [num_layers, num_rows, num_kv_heads, head_size] float32
  HeadRows<float> distinctness;      // [num_layers, num_rows, num_kv_heads, max_entries] float32
  HeadRows<const float> means;       // like directions; its data is nullable
  // [num_layers, num_rows, num_kv_heads, head_size, head_size] float32; nullable as means are
  HeadRows<const float> whitening;
  HeadRows<float> leverage;  // like distinctness; nullable as means are
};

}  // namespace ems
