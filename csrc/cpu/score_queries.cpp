// SPDX-License-Identifier: Apache-2.0

// Two passes over the products of queries and keys, neither of which stores them: the first finds
// each query's softmax denominator (skipped when lse is given), the second sums the columns. In the
// second an item owns its keys, so no two threads add to the same score.

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/attention_sums.h"
#include "cpu/index_checks.h"
#include "cpu/parallel.h"
#include "dispatch.h"
#include "ems/sampling.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

// Query vectors per item of the first pass, which packs every key it sees: enough to make up for
// it.
constexpr int64_t kRowsPerItem = 256;

struct Span {
  int64_t row;
  int64_t head;
  int64_t first;  // first sampled query of the first pass, first key of the second
};

// Of every row, the queries that score, in ascending order.
using Samples = std::vector<std::vector<int64_t>>;

Samples sample_queries(const ScoreQueriesParams& p) {
  Samples samples(p.num_rows);
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t first_position = p.seq_lens[row] - p.query_lens[row];
    for (int64_t query = 0; query < p.query_lens[row]; ++query) {
      if (is_sampled(first_position + query, static_cast<int32_t>(p.sample_stride))) {
        samples[row].push_back(query);
      }
    }
  }
  return samples;
}

void check_indices(const ScoreQueriesParams& p) {
  const IndexChecks checks("score_queries");
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t max_keys = p.block_table.num_columns * p.key_cache.block_size;
    const int64_t max_scores = p.score_table.num_columns * p.scores.block_size;
    checks.in_range("seq_lens", row, p.seq_lens[row], 0, std::min(max_keys, max_scores));
    checks.in_range("query_lens", row, p.query_lens[row], 0, p.seq_lens[row]);
    checks.in_range("query_starts", row, p.query_starts[row], 0,
                    p.query_lens[row] == 0 ? std::numeric_limits<int32_t>::max()
                                           : p.num_tokens - p.query_lens[row]);
    checks.entries("block_table", p.block_table, row, p.seq_lens[row], p.key_cache);
    checks.entries("score_table", p.score_table, row, p.seq_lens[row], p.scores);
  }
}

// The sampled queries of one row and kv_head, as factors: query i of the group's g-th head is row
// i * group + g.
template <typename T, typename C>
class QueryRows {
 public:
  QueryRows(const ScoreQueriesParams& p, const Samples& samples, int64_t row, int64_t head)
      : p_(p),
        factors_(p.head_size),
        samples_(samples[row]),
        head_(head),
        group_(p.num_heads / p.num_kv_heads),
        start_(p.query_starts[row]),
        first_position_(p.seq_lens[row] - p.query_lens[row]) {}

  // Loads sampled queries first..first+count-1.
  void load(int64_t first, int64_t count) {
    num_rows_ = count * group_;
    const int64_t num_words = factors_.num_words();
    rows_.resize(num_rows_ * num_words);
    visible_.resize(num_rows_);
    lse_.resize(num_rows_);
    for (int64_t i = 0; i < num_rows_; ++i) {
      const int64_t query = samples_[first + i / group_];
      const T* vector = p_.query.at<const T>(start_ + query, query_head(i));
      factors_.load(vector, rows_.data() + i * num_words);
      visible_[i] = first_position_ + query + 1;
    }
  }

  void load_lse(int64_t first, const float* lse) {
    for (int64_t i = 0; i < num_rows_; ++i) lse_[i] = lse[lse_index(first, i)];
  }

  void store_lse(int64_t first, float* lse) const {
    for (int64_t i = 0; i < num_rows_; ++i) lse[lse_index(first, i)] = lse_[i];
  }

  const Factors<T, C>& factors() const { return factors_; }
  const float* rows() const { return rows_.data(); }
  const int64_t* visible() const { return visible_.data(); }
  float* lse() { return lse_.data(); }
  int64_t num_rows() const { return num_rows_; }

 private:
  int64_t query_head(int64_t i) const { return head_ * group_ + i % group_; }
  int64_t lse_index(int64_t first, int64_t i) const {
    const int64_t token = start_ + samples_[first + i / group_];
    return token * p_.lse_token_stride + query_head(i) * p_.lse_head_stride;
  }

  const ScoreQueriesParams& p_;
  Factors<T, C> factors_;
  const std::vector<int64_t>& samples_;
  int64_t head_;
  int64_t group_;
  int64_t start_;
  int64_t first_position_;
  int64_t num_rows_ = 0;
  Floats rows_;
  std::vector<int64_t> visible_;
  Floats lse_;
};

template <typename T, typename C>
void pack_keys(const ScoreQueriesParams& p, const Factors<T, C>& factors, const Span& item,
               int64_t first, int64_t count, KeyTiles* keys) {
  keys->pack(first, count, [&](int64_t key, float* scratch) {
    const C* vector = p.key_cache.entry<const C>(p.block_table, item.row, 0, item.head, key);
    return factors.view(vector, scratch);
  });
}

// Queries of type T, keys of type C, here and below.
template <typename T, typename C>
void compute_lse(const ScoreQueriesParams& p, const Samples& samples, float* lse) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t queries_per_item = std::max<int64_t>(kRowsPerItem / group, 1);
  std::vector<Span> items;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      const int64_t num_queries = static_cast<int64_t>(samples[row].size());
      for (int64_t first = 0; first < num_queries; first += queries_per_item) {
        items.push_back({row, head, first});
      }
    }
  }
  parallel_items(static_cast<int64_t>(items.size()), [&](int64_t i) {
    const Span& item = items[i];
    const int64_t num_queries = static_cast<int64_t>(samples[item.row].size());
    const int64_t count = std::min(queries_per_item, num_queries - item.first);
    QueryRows<T, C> queries(p, samples, item.row, item.head);
    queries.load(item.first, count);
    std::vector<SoftmaxState> states(queries.num_rows());
    simd().init_softmax(states.data(), queries.num_rows());
    KeyTiles keys(queries.factors());
    const int64_t num_keys = queries.visible()[queries.num_rows() - 1];
    for (int64_t first = 0; first < num_keys; first += KeyTiles::kMaxKeys) {
      pack_keys(p, queries.factors(), item, first, std::min(KeyTiles::kMaxKeys, num_keys - first),
                &keys);
      keys.update_softmax(queries.rows(), p.scale, queries.visible(), queries.num_rows(),
                          states.data());
    }
    simd().finish_softmax(states.data(), queries.num_rows(), queries.lse());
    queries.store_lse(item.first, lse);
  });
}

// Keys of an item of the second pass, which loads every query that sees one of them: many where
// that leaves enough items for the threads.
int64_t keys_per_item(const ScoreQueriesParams& p) {
  constexpr int64_t kMaxGroups = 4, kItemsPerThread = 4;
  int64_t num_groups = 0;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    num_groups += p.num_kv_heads * (p.seq_lens[row] / KeyTiles::kMaxKeys);
  }
  const int64_t fair = num_groups / (kItemsPerThread * torch::stable::get_num_threads());
  return std::clamp<int64_t>(fair, 1, kMaxGroups) * KeyTiles::kMaxKeys;
}

template <typename T, typename C>
void add_scores(const ScoreQueriesParams& p, const Samples& samples, const float* lse) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t num_item_keys = keys_per_item(p);
  std::vector<Span> items;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      for (int64_t first = 0; first < p.seq_lens[row]; first += num_item_keys) {
        items.push_back({row, head, first});
      }
    }
  }
  parallel_items(static_cast<int64_t>(items.size()), [&](int64_t i) {
    const Span& item = items[i];
    const std::vector<int64_t>& sampled = samples[item.row];
    const int64_t num_queries = static_cast<int64_t>(sampled.size());
    const int64_t seq_len = p.seq_lens[item.row];
    const int64_t count = std::min(num_item_keys, seq_len - item.first);
    Floats received(num_item_keys, 0.0f);
    // Queries before the first key see none of these keys. In whole chunks of all queries, so that
    // sums do not depend on how keys are divided among items.
    const int64_t first_position = seq_len - p.query_lens[item.row];
    const int64_t first_query =
        (std::lower_bound(sampled.begin(), sampled.end(), item.first - first_position) -
         sampled.begin()) /
        kChunkRows * kChunkRows;
    if (first_query < num_queries) {
      QueryRows<T, C> queries(p, samples, item.row, item.head);
      std::vector<KeyTiles> tiles;
      for (int64_t key = 0; key < count; key += KeyTiles::kMaxKeys) {
        tiles.emplace_back(queries.factors());
        pack_keys(p, queries.factors(), item, item.first + key,
                  std::min(KeyTiles::kMaxKeys, count - key), &tiles.back());
      }
      // As many as are whole chunks of rows, whatever the group.
      for (int64_t query = first_query; query < num_queries; query += kChunkRows) {
        queries.load(query, std::min(kChunkRows, num_queries - query));
        queries.load_lse(query, lse);
        for (KeyTiles& keys : tiles) {
          keys.add_attention(queries.rows(), p.scale, queries.visible(), queries.lse(),
                             queries.num_rows(), received.data() + (keys.first() - item.first));
        }
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t key = item.first + j;
      const float mean =
          received[j] * static_cast<float>(p.sample_stride) / static_cast<float>(group);
      float* score = p.scores.entry<float>(p.score_table, item.row, 0, item.head, key);
      *score = key < p.accumulate_lens[item.row] ? *score + mean : mean;
    }
  });
}

}  // namespace

void score_queries(const ScoreQueriesParams& params) {
  check_indices(params);
  const Samples samples = sample_queries(params);
  const auto score = [&](auto element, auto cached) {
    using T = decltype(element);
    using C = decltype(cached);
    ScoreQueriesParams p = params;
    Floats lse;
    if (p.lse == nullptr) {
      lse.resize(p.num_tokens * p.num_heads);
      p.lse_token_stride = p.num_heads;
      p.lse_head_stride = 1;
      compute_lse<T, C>(p, samples, lse.data());
      p.lse = lse.data();
    }
    add_scores<T, C>(p, samples, p.lse);
  };
  dispatch_dtypes("score_queries", params.dtype, params.cache_dtype, QueryCachePairs{}, score);
}

}  // namespace ems::cpu
