// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/numeric.h"

// The inner loops of the CPU kernels, compiled once per instruction set and chosen at run time.
namespace ems::cpu {

// Keys are multiplied in tiles of this many, stored transposed: [head_size][kTileKeys].
constexpr int64_t kTileKeys = 64;

// Softmax state per query: a maximum and a sum for each SIMD lane, so that no lane waits for
// another before the end.
constexpr int64_t kMaxLanes = 16;
struct SoftmaxState {
  float max[kMaxLanes];
  float sum[kMaxLanes];
};

struct Simd {
  const char* name;

  // out[i] = factor * in[i].
  void (*convert_float32)(const float* in, int64_t length, float factor, float* out);
  void (*convert_bfloat16)(const BFloat16* in, int64_t length, float factor, float* out);
  void (*convert_float16)(const Float16* in, int64_t length, float factor, float* out);
  void (*convert_float8_e4m3)(const Float8E4M3* in, int64_t length, float factor, float* out);

  float (*dot)(const float* a, const float* b, int64_t length);

  // out[i] += factor * in[i].
  void (*add_scaled)(const float* in, int64_t length, float factor, float* out);

  // Undoes RoPE: pairs of a key, dimension i with i + num_pairs or 2 i with 2 i + 1, are turned by
  // the negative of their angles.
  void (*turn_back)(const float* cos, const float* sin, int64_t num_pairs, bool is_neox,
                    float* key);

  // The length to which vectors are padded for add_products.
  int64_t (*padded_size)(int64_t size);

  // sums[i][j] += sum over vectors of x[i] * x[j], at least for all j <= i; sums [size][size] of
  // vectors [num_vectors][size]. These are summed up first, in their order.
  void (*add_products)(const float* vectors, int64_t num_vectors, int64_t size, float* sums);

  // Transposes keys [kTileKeys], pointers to [num_words] each, to tile [num_words][kTileKeys];
  // 32-bit words of any kind.
  void (*transpose)(const float* const* keys, int64_t num_words, float* tile);

  // products[i][j] = rows[i] . key j, as [num_rows][kTileKeys]. The sum runs over the head size in
  // order, wherever in the tile a key lies: equal keys give equal products.
  void (*multiply)(const float* rows, int64_t num_rows, int64_t head_size, const float* tile,
                   float* products);

  // The same of words that hold two bfloat16 each, rows [num_rows][num_words] and tile
  // [num_words][kTileKeys]; sums are float32. Null where the processor has no instruction for it.
  void (*multiply_bfloat16)(const float* rows, int64_t num_rows, int64_t num_words,
                            const float* tile, float* products);

  // Take the first visible[i] products of row i (all, or none, when it is beyond the tile) into the
  // state of its softmax; scale > 0 makes logits of them. Overwrites hidden products.
  void (*init_softmax)(SoftmaxState* states, int64_t num_rows);
  void (*update_softmax)(float* products, float scale, const int64_t* visible, int64_t num_rows,
                         SoftmaxState* states);
  // lse[i] = log of the sum of exponentials; -inf for a row that saw nothing.
  void (*finish_softmax)(const SoftmaxState* states, int64_t num_rows, float* lse);

  // received[j] += sum over rows of exp(scale * products[i][j] - lse[i]), over the first visible[i]
  // keys of row i; peaks[j], which may be null, becomes at least each of them; scale > 0.
  // Overwrites hidden products.
  void (*add_attention)(float* products, float scale, const int64_t* visible, const float* lse,
                        int64_t num_rows, float* received, float* peaks);

  // Redundancies of [num_rows][kTileKeys] in the place of the products of their keys, and the
  // largest of each row: max(keys[i][j], 0) * max(values[i][j], 0), divided by the norms of all
  // four vectors. by_key_norm and by_value_norm have the inverse of each row's, by_norms
  // [kTileKeys] that of both of a column.
  void (*redundancy)(float* keys, const float* values, const float* by_key_norm,
                     const float* by_value_norm, const float* by_norms, int64_t num_rows,
                     float* maxima);
};

// The best variant this processor runs, or the one named by EMS_CPU_VARIANT. Fixed at first use.
const Simd& simd();

inline void convert(const float* in, int64_t length, float factor, float* out) {
  simd().convert_float32(in, length, factor, out);
}
inline void convert(const BFloat16* in, int64_t length, float factor, float* out) {
  simd().convert_bfloat16(in, length, factor, out);
}
inline void convert(const Float16* in, int64_t length, float factor, float* out) {
  simd().convert_float16(in, length, factor, out);
}
inline void convert(const Float8E4M3* in, int64_t length, float factor, float* out) {
  simd().convert_float8_e4m3(in, length, factor, out);
}

}  // namespace ems::cpu
