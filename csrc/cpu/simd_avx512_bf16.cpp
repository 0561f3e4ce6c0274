// SPDX-License-Identifier: Apache-2.0

// The avx512 variant with its largest loop on the processor's own products of bfloat16: two
// multiplications and additions in float32 for every lane, twice as many as for floats.

#include <immintrin.h>

#include "build_config.h"
#include "cpu/simd.h"

#if EMS_X86_VARIANTS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace ems::cpu {
namespace avx512 {
extern const Simd kSimd;
}
namespace avx512_bf16 {
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 8;

inline __m512bh words(const float* at) { return (__m512bh)_mm512_loadu_si512(at); }
inline __m512bh everywhere(const float* at) {
  return (__m512bh)_mm512_castps_si512(_mm512_set1_ps(*at));
}

template <int NUM_ROWS>
inline void multiply_tile(const float* rows, int64_t num_words, const float* tile,
                          float* products) {
  __m512 left[NUM_ROWS], right[NUM_ROWS];
  for (int i = 0; i < NUM_ROWS; ++i) left[i] = right[i] = _mm512_setzero_ps();
  for (int64_t w = 0; w < num_words; ++w) {
    const __m512bh key_left = words(tile + w * kTileKeys);
    const __m512bh key_right = words(tile + w * kTileKeys + kLanes);
    for (int i = 0; i < NUM_ROWS; ++i) {
      const __m512bh row = everywhere(rows + i * num_words + w);
      left[i] = _mm512_dpbf16_ps(left[i], row, key_left);
      right[i] = _mm512_dpbf16_ps(right[i], row, key_right);
    }
  }
  for (int i = 0; i < NUM_ROWS; ++i) {
    _mm512_storeu_ps(products + i * kTileKeys, left[i]);
    _mm512_storeu_ps(products + i * kTileKeys + kLanes, right[i]);
  }
}

template <int NUM_ROWS>
inline void multiply_rows(const float* rows, int64_t num_words, const float* tile,
                          float* products) {
  for (int64_t key = 0; key < kTileKeys; key += 2 * kLanes) {
    multiply_tile<NUM_ROWS>(rows, num_words, tile + key, products + key);
  }
}

void multiply_bfloat16(const float* rows, int64_t num_rows, int64_t num_words, const float* tile,
                       float* products) {
  int64_t i = 0;
  for (; i + kRows <= num_rows; i += kRows) {
    multiply_rows<kRows>(rows + i * num_words, num_words, tile, products + i * kTileKeys);
  }
  for (; i < num_rows; ++i) {
    multiply_rows<1>(rows + i * num_words, num_words, tile, products + i * kTileKeys);
  }
}

}  // namespace

const Simd& variant() {
  static const Simd simd = [] {
    Simd changed = avx512::kSimd;
    changed.name = "avx512_bf16";
    changed.multiply_bfloat16 = multiply_bfloat16;
    return changed;
  }();
  return simd;
}

}  // namespace avx512_bf16
}  // namespace ems::cpu
#endif
