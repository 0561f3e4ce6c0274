// SPDX-License-Identifier: Apache-2.0

#include <immintrin.h>

#include <cmath>
#include <limits>

#include "build_config.h"
#include "cpu/simd.h"

#if EMS_X86_VARIANTS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define EMS_VARIANT avx512
#define EMS_VARIANT_NAME "avx512"
#define EMS_LANES 16
#define EMS_ROWS 8
#define EMS_OWN_SHUFFLES 1

// GCC 12 says these of its own header wherever it is inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace ems::cpu::avx512::shuffles {

inline float sum_of(__m512 vector) { return _mm512_reduce_add_ps(vector); }

// 16 keys of up to 16 words, in four steps that each exchange parts of pairs of registers.
inline void transpose_square(const float* const* keys, __mmask16 words, int64_t num_words,
                             float* tile) {
  __m512 rows[16], turned[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_maskz_loadu_ps(words, keys[i]);
  for (int i = 0; i < 16; i += 2) {
    turned[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    turned[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(turned[i + j]);
      const __m512d high = _mm512_castps_pd(turned[i + j + 2]);
      rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // A quarter of a register has the same word of four keys now; quarters 0 to 3 have words that are
  // four apart.
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      turned[i + j] = _mm512_shuffle_f32x4(rows[i + j], rows[i + j + 4], 0x88);
      turned[i + j + 4] = _mm512_shuffle_f32x4(rows[i + j], rows[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    rows[j] = _mm512_shuffle_f32x4(turned[j], turned[j + 8], 0x88);
    rows[j + 8] = _mm512_shuffle_f32x4(turned[j], turned[j + 8], 0xdd);
  }
  for (int64_t w = 0; w < num_words; ++w) _mm512_storeu_ps(tile + w * kTileKeys, rows[w]);
}

inline void transpose(const float* const* keys, int64_t num_words, float* tile) {
  for (int64_t first = 0; first < num_words; first += 16) {
    const int64_t count = num_words - first < 16 ? num_words - first : 16;
    const auto words = static_cast<__mmask16>((1u << count) - 1);
    const float* from[kTileKeys];
    for (int64_t key = 0; key < kTileKeys; ++key) from[key] = keys[key] + first;
    for (int64_t key = 0; key < kTileKeys; key += 16) {
      transpose_square(from + key, words, count, tile + first * kTileKeys + key);
    }
  }
}

}  // namespace ems::cpu::avx512::shuffles

#include "cpu/simd_variant.inl"
#endif
