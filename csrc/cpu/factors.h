// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace ems::cpu {

// How queries of type T and keys of type C are multiplied: as floats, with the scale already in the
// query. Where both are bfloat16 and the processor multiplies those, they stay as they are, two to
// the word, and the scale comes after the sum.
template <typename T, typename C>
class Factors {
 public:
  Factors(int64_t head_size, float scale)
      : head_size_(head_size),
        scale_(scale),
        in_pairs_(std::is_same_v<T, BFloat16> && std::is_same_v<C, BFloat16> &&
                  head_size % 2 == 0 && simd().multiply_bfloat16 != nullptr) {}

  bool in_pairs() const { return in_pairs_; }
  float scale() const { return scale_; }

  // 32-bit words of a vector.
  int64_t num_words() const { return in_pairs_ ? head_size_ / 2 : head_size_; }

  void load_query(const T* vector, float* out) const { load(vector, scale_, out); }
  void load_key(const C* vector, float* out) const { load(vector, 1.0f, out); }

 private:
  template <typename V>
  void load(const V* vector, float factor, float* out) const {
    if (in_pairs_) {
      std::memcpy(out, vector, head_size_ * sizeof(V));
    } else {
      convert(vector, head_size_, factor, out);
    }
  }

  int64_t head_size_;
  float scale_;
  bool in_pairs_;
};

}  // namespace ems::cpu
