// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace ems::cpu {

// How vectors of types T and C are multiplied: as floats or, where both are bfloat16 and the
// processor multiplies those, as they are, two to the word.
template <typename T, typename C>
class Factors {
 public:
  explicit Factors(int64_t head_size)
      : head_size_(head_size),
        in_pairs_(std::is_same_v<T, BFloat16> && std::is_same_v<C, BFloat16> &&
                  head_size % 2 == 0 && simd().multiply_bfloat16 != nullptr) {}

  bool in_pairs() const { return in_pairs_; }

  // 32-bit words of a vector.
  int64_t num_words() const { return in_pairs_ ? head_size_ / 2 : head_size_; }

  // A vector of either type as words: itself where it has them already, else in scratch.
  template <typename V>
  const float* view(const V* vector, float* scratch) const {
    const bool has_words = (std::is_same_v<V, float> || in_pairs_) &&
                           reinterpret_cast<uintptr_t>(vector) % alignof(float) == 0;
    if (has_words) return reinterpret_cast<const float*>(vector);
    load(vector, scratch);
    return scratch;
  }

  template <typename V>
  void load(const V* vector, float* out) const {
    if (in_pairs_) {
      std::memcpy(out, vector, head_size_ * sizeof(V));
    } else {
      convert(vector, head_size_, 1.0f, out);
    }
  }

 private:
  int64_t head_size_;
  bool in_pairs_;
};

}  // namespace ems::cpu
