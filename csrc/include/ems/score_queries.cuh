// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ems/attention_sums.cuh"
#include "ems/attention_sums_sm90.cuh"
#include "ems/params.h"
#include "ems/sampling.h"

// score_queries: the queries of a chunk of a prompt, or a stratified sample of them.
namespace ems {

// The sampled queries of one kv_head of one row, in ascending order of position. Index v counts the
// sampled positions and, within a position, the query heads of the group.
class ChunkQueries {
 public:
  EMS_DEVICE ChunkQueries(const ScoreQueriesParams& p, int64_t row, int64_t kv_head)
      : stride_(static_cast<int32_t>(p.sample_stride)),
        group_(static_cast<int32_t>(p.num_heads / p.num_kv_heads)),
        first_head_(static_cast<int32_t>(kv_head) * group_),
        start_(p.query_starts[row]),
        num_queries_(p.query_lens[row]),
        first_position_(p.seq_lens[row] - p.query_lens[row]),
        lse_token_stride_(p.lse_token_stride),
        lse_head_stride_(p.lse_head_stride),
        query_(p.query) {
    first_stratum_ = first_position_ / stride_;
    const int32_t last = (first_position_ + num_queries_ - 1) / stride_;
    size_ = num_queries_ == 0 ? 0 : (last - first_stratum_ + 1) * group_;
  }

  EMS_DEVICE int32_t size() const { return size_; }

  EMS_DEVICE Query at(int32_t index) const {
    // Unsigned, which divides in half as many instructions.
    const int32_t stratum = static_cast<uint32_t>(index) / static_cast<uint32_t>(group_);
    const int32_t position = sampled_position(first_stratum_ + stratum, stride_);
    const int32_t query = position - first_position_;
    // Of the first and the last stratum a chunk may not have the position that is used.
    if (query < 0 || query >= num_queries_) return {-1, 0, 0};
    const int64_t token = start_ + query;
    const int32_t head = first_head_ + index - stratum * group_;
    return {token * query_.token_stride + head * query_.head_stride, position + 1,
            token * lse_token_stride_ + head * lse_head_stride_};
  }

  EMS_DEVICE int32_t first_seeing(int32_t key) const {
    const int32_t strata = key / stride_ - first_stratum_;
    return strata > 0 ? strata * group_ : 0;
  }

 private:
  int32_t stride_;
  int32_t group_;
  int32_t first_head_;
  int32_t start_;
  int32_t num_queries_;
  int32_t first_position_;
  int32_t first_stratum_ = 0;
  int32_t size_ = 0;
  int64_t lse_token_stride_;
  int64_t lse_head_stride_;
  TokenHeads query_;
};

// Upper bound, known without reading the device, of the tiles of tile_size queries of a batch.
inline int64_t max_query_tiles(const ScoreQueriesParams& p, int64_t tile_size) {
  const int64_t strata = p.num_tokens / p.sample_stride + 2 * p.num_rows;
  const int64_t queries = strata * (p.num_heads / p.num_kv_heads);
  return queries / tile_size + p.num_rows;
}

// Calls f(row, queries, first_query) for the tile of a CTA that counts the tiles of all rows from
// the last one, because the last queries see the most keys. CTAs beyond the tiles that exist have
// nothing to do.
template <int TILE_SIZE, typename F>
EMS_DEVICE void for_own_tile(const ScoreQueriesParams& p, int64_t cta, int64_t kv_head,
                             const F& f) {
  int32_t tile = static_cast<int32_t>(cta);
  for (int64_t row = p.num_rows - 1; row >= 0; --row) {
    const ChunkQueries queries(p, row, kv_head);
    const int32_t num_tiles = (queries.size() + TILE_SIZE - 1) / TILE_SIZE;
    if (tile < num_tiles) {
      f(row, queries, (num_tiles - 1 - tile) * TILE_SIZE);
      return;
    }
    tile -= num_tiles;
  }
}

// Keys first..end-1, part `part` of num_parts of the keys of a row, in whole tiles of TILE_SIZE.
struct KeyRange {
  int32_t first;
  int32_t end;
};

template <int TILE_SIZE>
EMS_DEVICE KeyRange key_range(int32_t num_keys, int32_t part, int32_t num_parts) {
  const int32_t num_tiles = (num_keys + TILE_SIZE - 1) / TILE_SIZE;
  const int32_t size = (num_tiles + num_parts - 1) / num_parts * TILE_SIZE;
  const int32_t end = (part + 1) * size;
  return {part * size, end < num_keys ? end : num_keys};
}

// Adds what a key received to its score, or replaces it.
struct AddToScore {
  const ScoreQueriesParams& p;
  int64_t row;
  int64_t kv_head;

  EMS_DEVICE void operator()(int32_t key, float received) const {
    const float group = static_cast<float>(p.num_heads / p.num_kv_heads);
    const float mean = received * static_cast<float>(p.sample_stride) / group;
    float* score = p.scores.entry<float>(p.score_table, row, 0, kv_head, key);
    *score = mean + (key < p.accumulate_lens[row] ? *score : 0.0f);
  }
};

// CTA (x, kv_head, part): one tile of queries, against one part of the keys that its row has.
// partial: [num_parts, num_tokens, num_heads], float32.
template <typename T, int HEAD_SIZE, typename C>
EMS_KERNEL((SumShape<T, HEAD_SIZE>::kThreads), (SumShape<T, HEAD_SIZE>::kMinCtas))
score_queries_lse_kernel(ScoreQueriesParams p, int32_t num_parts, float* partial) {
  using Shape = SumShape<T, HEAD_SIZE>;
  const int64_t kv_head = device::cta_y();
  const auto part = static_cast<int32_t>(device::cta_z());
  float* lse = partial + part * p.num_tokens * p.num_heads;
  for_own_tile<Shape::kStaying>(
      p, device::cta_x(), kv_head,
      [&](int64_t row, const ChunkQueries& queries, int32_t first_query) {
        const PagedKeys keys{p.key_cache, p.block_table, 0, row, kv_head};
        const KeyRange range = key_range<Shape::kStreaming>(p.seq_lens[row], part, num_parts);
        compute_lse<T, HEAD_SIZE, C>(queries, static_cast<const T*>(p.query.data), keys,
                                     first_query, range.first, range.end, p.scale,
                                     [&](int64_t index, float value) { lse[index] = value; });
      });
}

// CTA (x, row): kv_head x % num_kv_heads and tile of keys x / num_kv_heads, so that the first keys,
// which the most queries see, come first.
template <typename T, int HEAD_SIZE, typename C>
EMS_KERNEL((SumShape<T, HEAD_SIZE>::kThreads), (SumShape<T, HEAD_SIZE>::kMinCtas))
score_queries_kernel(ScoreQueriesParams p, const float* lse) {
  const int64_t row = device::cta_y();
  const int64_t kv_head = device::cta_x() % p.num_kv_heads;
  const int32_t first_key =
      static_cast<int32_t>(device::cta_x() / p.num_kv_heads) * SumShape<T, HEAD_SIZE>::kStaying;
  const int32_t num_keys = p.seq_lens[row];
  if (first_key >= num_keys) return;
  const PagedKeys keys{p.key_cache, p.block_table, 0, row, kv_head};
  const AddToScore add{p, row, kv_head};
  add_attention<T, HEAD_SIZE, C, Received>(
      ChunkQueries(p, row, kv_head), static_cast<const T*>(p.query.data), keys, first_key, num_keys,
      p.scale, lse, [&](int32_t key, const Received& received) { add(key, received.sum); });
}

// The same two for compute capability 9.0a. In code for other GPUs they are errors: an empty kernel
// that is run by mistake would succeed and leave old scores in place.
template <typename T, int HEAD_SIZE>
EMS_KERNEL(sm90::SumShape<HEAD_SIZE>::kThreads, 1)
score_queries_lse_sm90_kernel(ScoreQueriesParams p, int32_t num_parts, float* partial) {
#if EMS_IS_SM90A
  using Shape = sm90::SumShape<HEAD_SIZE>;
  const int64_t kv_head = device::cta_y();
  const auto part = static_cast<int32_t>(device::cta_z());
  float* lse = partial + part * p.num_tokens * p.num_heads;
  for_own_tile<Shape::kStaying>(
      p, device::cta_x(), kv_head,
      [&](int64_t row, const ChunkQueries& queries, int32_t first_query) {
        const PagedKeys keys{p.key_cache, p.block_table, 0, row, kv_head};
        const KeyRange range = key_range<Shape::kStreaming>(p.seq_lens[row], part, num_parts);
        sm90::compute_lse<T, HEAD_SIZE>(queries, static_cast<const T*>(p.query.data), keys,
                                        first_query, range.first, range.end, p.scale,
                                        [&](int64_t index, float value) { lse[index] = value; });
      });
#else
  device::trap();
#endif
}

template <typename T, int HEAD_SIZE, typename C>
EMS_KERNEL(sm90::SumShape<HEAD_SIZE>::kThreads, 1)
score_queries_sm90_kernel(ScoreQueriesParams p, const float* lse) {
#if EMS_IS_SM90A
  const int64_t row = device::cta_y();
  const int64_t kv_head = device::cta_x() % p.num_kv_heads;
  const int32_t first_key =
      static_cast<int32_t>(device::cta_x() / p.num_kv_heads) * sm90::SumShape<HEAD_SIZE>::kStaying;
  const int32_t num_keys = p.seq_lens[row];
  if (first_key >= num_keys) return;
  const PagedKeys keys{p.key_cache, p.block_table, 0, row, kv_head};
  sm90::add_attention<T, HEAD_SIZE, C>(ChunkQueries(p, row, kv_head),
                                       static_cast<const T*>(p.query.data), keys, first_key,
                                       num_keys, p.scale, lse, AddToScore{p, row, kv_head});
#else
  device::trap();
#endif
}

}  // namespace ems
