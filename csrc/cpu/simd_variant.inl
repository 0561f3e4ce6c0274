// SPDX-License-Identifier: Apache-2.0

// One variant of ems::cpu::Simd. The including file has set the target, included <cmath>,
// <limits> and "cpu/simd.h" before that (so that nothing shared with other files is compiled for
// it), and defined
//   EMS_VARIANT  name of the variant's namespace
//   EMS_LANES    floats per vector register, at most kMaxLanes
//   EMS_ROWS     rows of a register tile; EMS_ROWS * 2 accumulators must fit the register file
// and may define EMS_OWN_SHUFFLES to 1 and, in a namespace `shuffles` of the variant's, sum_of and
// transpose.

namespace ems::cpu {
namespace EMS_VARIANT {
namespace {

constexpr int64_t kLanes = EMS_LANES;
constexpr int64_t kVectors = kTileKeys / kLanes;
static_assert(kLanes <= kMaxLanes && kVectors % 2 == 0);

// The alignment and aliasing of a float, so that any float pointer may be read as a vector.
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

constexpr float kHidden = -std::numeric_limits<float>::infinity();
// Below every logit, yet finite: the difference of two maxima must not be inf - inf.
constexpr float kNoMax = -1e30f;

inline Vec splat(float value) { return Vec{} + value; }

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// exp with a relative error below 2 ulp, for x up to 88: differences to a maximum or to the log of
// a sum are about 0 at most. 0 where the result would not be a normal float.
inline Vec exp(Vec x) {
  const float low = -88.0f;
  x = low > x ? splat(low) : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const float round = 12582912.0f;
  const Vec shifted = x * 1.44269504f + round;
  const Vec n = shifted - round;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // The best polynomial of its degree for the relative error, 1.0e-7 (our fit).
  Vec p = splat(8.290272e-3f);
  p = p * r + 4.189816e-2f;
  p = p * r + 1.6667639e-1f;
  p = p * r + 4.9999148e-1f;
  p = p * r + 9.999997e-1f;
  p = p * r + 1.0f;
  // At n = -127 all bits of the power are 0, and so is the power.
  return p * (Vec)(((IntVec)shifted << 23) + (127 << 23));
}

template <typename T>
void convert(const T* in, int64_t length, float factor, float* out) {
  for (int64_t i = 0; i < length; ++i) out[i] = factor * to_float(in[i]);
}

#if EMS_OWN_SHUFFLES
using shuffles::sum_of;
using shuffles::transpose;
#else
// By halves: one lane after the other takes longer than what is summed up.
inline float sum_of(Vec vector) {
  float lanes[kLanes];
  *(Vec*)lanes = vector;
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

void transpose(const float* const* keys, int64_t num_words, float* tile) {
  constexpr int64_t kBlock = 16;
  for (int64_t first = 0; first < num_words; first += kBlock) {
    const int64_t end = first + kBlock < num_words ? first + kBlock : num_words;
    for (int64_t key = 0; key < kTileKeys; ++key) {
      for (int64_t w = first; w < end; ++w) tile[w * kTileKeys + key] = keys[key][w];
    }
  }
}
#endif

float dot(const float* a, const float* b, int64_t length) {
  Vec sums = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) sums += *(const Vec*)(a + i) * *(const Vec*)(b + i);
  float sum = sum_of(sums);
  for (; i < length; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(const float* in, int64_t length, float factor, float* out) {
  for (int64_t i = 0; i < length; ++i) out[i] += factor * in[i];
}

void turn_back(const float* cos, const float* sin, int64_t num_pairs, bool is_neox, float* key) {
  if (is_neox) {
    float* other = key + num_pairs;
    for (int64_t i = 0; i < num_pairs; ++i) {
      const float first = key[i], second = other[i];
      key[i] = first * cos[i] + second * sin[i];
      other[i] = second * cos[i] - first * sin[i];
    }
    return;
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    const float first = key[2 * i], second = key[2 * i + 1];
    key[2 * i] = first * cos[i] + second * sin[i];
    key[2 * i + 1] = second * cos[i] - first * sin[i];
  }
}

int64_t padded_size(int64_t size) {
  constexpr int64_t kTile = 2 * kLanes;
  return (size + kTile - 1) / kTile * kTile;
}

// EMS_ROWS rows of the sums and two vectors of columns, held in registers.
inline void add_products_tile(const float* rows, const float* columns, int64_t num_vectors,
                              int64_t size, float* sums) {
  Vec left[EMS_ROWS], right[EMS_ROWS];
  for (int i = 0; i < EMS_ROWS; ++i) left[i] = right[i] = Vec{};
  for (int64_t v = 0; v < num_vectors; ++v) {
    const Vec column_left = *(const Vec*)(columns + v * size);
    const Vec column_right = *(const Vec*)(columns + v * size + kLanes);
    for (int i = 0; i < EMS_ROWS; ++i) {
      left[i] += rows[v * size + i] * column_left;
      right[i] += rows[v * size + i] * column_right;
    }
  }
  for (int i = 0; i < EMS_ROWS; ++i) {
    *(Vec*)(sums + i * size) += left[i];
    *(Vec*)(sums + i * size + kLanes) += right[i];
  }
}

void add_products(const float* vectors, int64_t num_vectors, int64_t size, float* sums) {
  static_assert(2 * kLanes % EMS_ROWS == 0);
  for (int64_t row = 0; row < size; row += EMS_ROWS) {
    for (int64_t column = 0; column < row + EMS_ROWS; column += 2 * kLanes) {
      add_products_tile(vectors + row, vectors + column, num_vectors, size,
                        sums + row * size + column);
    }
  }
}

// NUM_ROWS rows times two vectors of keys, held in registers.
template <int NUM_ROWS>
inline void multiply_tile(const float* rows, int64_t head_size, const float* tile,
                          float* products) {
  // Element by element: GCC clears a whole array in memory before it loads it into registers.
  Vec left[NUM_ROWS], right[NUM_ROWS];
  for (int i = 0; i < NUM_ROWS; ++i) left[i] = right[i] = Vec{};
  for (int64_t d = 0; d < head_size; ++d) {
    const Vec key_left = *(const Vec*)(tile + d * kTileKeys);
    const Vec key_right = *(const Vec*)(tile + d * kTileKeys + kLanes);
    for (int i = 0; i < NUM_ROWS; ++i) {
      left[i] += rows[i * head_size + d] * key_left;
      right[i] += rows[i * head_size + d] * key_right;
    }
  }
  for (int i = 0; i < NUM_ROWS; ++i) {
    *(Vec*)(products + i * kTileKeys) = left[i];
    *(Vec*)(products + i * kTileKeys + kLanes) = right[i];
  }
}

template <int NUM_ROWS>
inline void multiply_rows(const float* rows, int64_t head_size, const float* tile,
                          float* products) {
  for (int64_t key = 0; key < kTileKeys; key += 2 * kLanes) {
    multiply_tile<NUM_ROWS>(rows, head_size, tile + key, products + key);
  }
}

void multiply(const float* rows, int64_t num_rows, int64_t head_size, const float* tile,
              float* products) {
  int64_t i = 0;
  for (; i + EMS_ROWS <= num_rows; i += EMS_ROWS) {
    multiply_rows<EMS_ROWS>(rows + i * head_size, head_size, tile, products + i * kTileKeys);
  }
  for (; i + 2 <= num_rows; i += 2) {
    multiply_rows<2>(rows + i * head_size, head_size, tile, products + i * kTileKeys);
  }
  if (i < num_rows) {
    multiply_rows<1>(rows + i * head_size, head_size, tile, products + i * kTileKeys);
  }
}

void hide(float* products, int64_t visible) {
  for (int64_t key = visible; key < kTileKeys; ++key) products[key] = kHidden;
}

void init_softmax(SoftmaxState* states, int64_t num_rows) {
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      states[i].max[lane] = kNoMax;
      states[i].sum[lane] = 0;
    }
  }
}

void update_softmax(float* products, float scale, const int64_t* visible, int64_t num_rows,
                    SoftmaxState* states) {
  for (int64_t i = 0; i < num_rows; ++i, products += kTileKeys) {
    if (visible[i] <= 0) continue;
    hide(products, visible[i]);
    const Vec* row = (const Vec*)products;
    const Vec old_max = *(const Vec*)states[i].max;
    Vec largest = row[0];
    for (int64_t v = 1; v < kVectors; ++v) largest = maximum(largest, row[v]);
    const Vec max = maximum(old_max, largest * scale);
    Vec sum = *(const Vec*)states[i].sum * exp(old_max - max);
    for (int64_t v = 0; v < kVectors; ++v) sum += exp(row[v] * scale - max);
    *(Vec*)states[i].max = max;
    *(Vec*)states[i].sum = sum;
  }
}

void finish_softmax(const SoftmaxState* states, int64_t num_rows, float* lse) {
  for (int64_t i = 0; i < num_rows; ++i) {
    float max = kNoMax;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (states[i].max[lane] > max) max = states[i].max[lane];
    }
    const Vec sums = *(const Vec*)states[i].sum * exp(*(const Vec*)states[i].max - max);
    float sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    lse[i] = max + std::log(sum);
  }
}

template <bool PEAKS>
void add_attention_of(float* products, float scale, const int64_t* visible, const float* lse,
                      int64_t num_rows, float* received, float* peaks) {
  Vec sums[kVectors] = {};
  Vec most[PEAKS ? kVectors : 1] = {};
  for (int64_t i = 0; i < num_rows; ++i, products += kTileKeys) {
    if (visible[i] <= 0) continue;
    hide(products, visible[i]);
    for (int64_t v = 0; v < kVectors; ++v) {
      const Vec attention = exp(((const Vec*)products)[v] * scale - lse[i]);
      sums[v] += attention;
      if constexpr (PEAKS) most[v] = maximum(most[v], attention);
    }
  }
  for (int64_t v = 0; v < kVectors; ++v) {
    ((Vec*)received)[v] += sums[v];
    if constexpr (PEAKS) ((Vec*)peaks)[v] = maximum(((Vec*)peaks)[v], most[v]);
  }
}

void add_attention(float* products, float scale, const int64_t* visible, const float* lse,
                   int64_t num_rows, float* received, float* peaks) {
  if (peaks == nullptr) {
    add_attention_of<false>(products, scale, visible, lse, num_rows, received, peaks);
  } else {
    add_attention_of<true>(products, scale, visible, lse, num_rows, received, peaks);
  }
}

void redundancy(float* keys, const float* values, const float* by_key_norm,
                const float* by_value_norm, const float* by_norms, int64_t num_rows,
                float* maxima) {
  for (int64_t i = 0; i < num_rows; ++i, keys += kTileKeys, values += kTileKeys) {
    Vec most = {};
    for (int64_t v = 0; v < kVectors; ++v) {
      // A row's own norms first, so that large vectors do not overflow.
      const Vec key = maximum(((const Vec*)keys)[v] * by_key_norm[i], Vec{});
      const Vec value = maximum(((const Vec*)values)[v] * by_value_norm[i], Vec{});
      ((Vec*)keys)[v] = key * value * ((const Vec*)by_norms)[v];
      most = maximum(most, ((const Vec*)keys)[v]);
    }
    maxima[i] = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (most[lane] > maxima[i]) maxima[i] = most[lane];
    }
  }
}

}  // namespace

extern const Simd kSimd;
const Simd kSimd = {
    .name = EMS_VARIANT_NAME,
    .convert_float32 = convert<float>,
    .convert_bfloat16 = convert<BFloat16>,
    .convert_float16 = convert<Float16>,
    .convert_float8_e4m3 = convert<Float8E4M3>,
    .dot = dot,
    .add_scaled = add_scaled,
    .turn_back = turn_back,
    .padded_size = padded_size,
    .add_products = add_products,
    .transpose = transpose,
    .multiply = multiply,
    .multiply_bfloat16 = nullptr,
    .init_softmax = init_softmax,
    .update_softmax = update_softmax,
    .finish_softmax = finish_softmax,
    .add_attention = add_attention,
    .redundancy = redundancy,
};

}  // namespace EMS_VARIANT
}  // namespace ems::cpu
