// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/factors.h"
#include "cpu/simd.h"

// Attention of many queries to the keys of one kv_head without its matrix: the log of each query's
// softmax denominator, and the attention each key receives in sum.
namespace ems::cpu {

// Rows are handled in chunks whose products stay in the first-level cache.
constexpr int64_t kChunkRows = 32;

// Up to kMaxTiles tiles of consecutive keys, transposed.
class KeyTiles {
 public:
  // Packing a tile costs as much as multiplying it with a few rows; several tiles per pass over the
  // queries spread the cost of converting those.
  static constexpr int64_t kMaxTiles = 4;
  static constexpr int64_t kMaxKeys = kMaxTiles * kTileKeys;

  // Keys and rows are as these factors load them.
  template <typename T, typename C>
  explicit KeyTiles(const Factors<T, C>& factors)
      : num_words_(factors.num_words()),
        in_pairs_(factors.in_pairs()),
        staged_(kTileKeys * num_words_),
        tiles_(kMaxKeys * num_words_),
        products_(kChunkRows * kTileKeys),
        visible_(kChunkRows) {}

  // Loads keys first..first+count-1. view(key, scratch) gives the words of one, which may be in the
  // scratch. Keys that fill up the last tile are zero.
  template <typename F>
  void pack(int64_t first, int64_t count, const F& view) {
    first_ = first;
    count_ = count;
    const float* keys[kTileKeys];
    for (int64_t start = 0; start < count; start += kTileKeys) {
      for (int64_t key = 0; key < kTileKeys; ++key) {
        float* scratch = staged_.data() + key * num_words_;
        keys[key] = scratch;
        if (start + key < count) {
          keys[key] = view(first + start + key, scratch);
        } else {
          std::fill_n(scratch, num_words_, 0.0f);
        }
      }
      simd().transpose(keys, num_words_, tiles_.data() + start * num_words_);
    }
  }

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }

  // Products of up to kChunkRows rows with the keys of the tile that starts at key `start` (a
  // multiple of kTileKeys, counted from first()); [num_rows][kTileKeys].
  float* multiply(int64_t start, const float* rows, int64_t num_rows) {
    const float* tile = tiles_.data() + start * num_words_;
    if (in_pairs_) {
      simd().multiply_bfloat16(rows, num_rows, num_words_, tile, products_.data());
    } else {
      simd().multiply(rows, num_rows, num_words_, tile, products_.data());
    }
    return products_.data();
  }

  // Takes these keys into the softmax of the rows. Row i sees keys 0..visible[i]-1.
  void update_softmax(const float* rows, float scale, const int64_t* visible, int64_t num_rows,
                      SoftmaxState* states) {
    for_tiles(rows, visible, num_rows, [&](int64_t, int64_t row, int64_t count, float* products) {
      simd().update_softmax(products, at_least_smallest(scale), visible_.data(), count,
                            states + row);
    });
  }

  // received[j] += attention that the rows pay to key first() + j, and peaks[j], which may be null,
  // is at least what each pays; both have kMaxKeys elements.
  void add_attention(const float* rows, float scale, const int64_t* visible, const float* lse,
                     int64_t num_rows, float* received, float* peaks = nullptr) {
    for_tiles(
        rows, visible, num_rows, [&](int64_t start, int64_t row, int64_t count, float* products) {
          simd().add_attention(products, at_least_smallest(scale), visible_.data(), lse + row,
                               count, received + start, peaks == nullptr ? nullptr : peaks + start);
        });
  }

 private:
  // Of a scale of 0, which would make NaN of the -inf that hides a product.
  static float at_least_smallest(float scale) { return std::max(scale, 1e-35f); }

  template <typename F>
  void for_tiles(const float* rows, const int64_t* visible, int64_t num_rows, const F& f) {
    for (int64_t row = 0; row < num_rows; row += kChunkRows) {
      const int64_t num_chunk = std::min(kChunkRows, num_rows - row);
      for (int64_t start = 0; start < count_; start += kTileKeys) {
        int64_t most = 0;
        for (int64_t i = 0; i < num_chunk; ++i) {
          visible_[i] = std::min(visible[row + i], first_ + count_) - (first_ + start);
          most = std::max(most, visible_[i]);
        }
        if (most == 0) break;
        f(start, row, num_chunk, multiply(start, rows + row * num_words_, num_chunk));
      }
    }
  }

  int64_t num_words_;  // of a vector
  bool in_pairs_;
  int64_t first_ = 0;
  int64_t count_ = 0;
  Floats staged_;
  Floats tiles_;
  Floats products_;
  std::vector<int64_t> visible_;
};

}  // namespace ems::cpu
