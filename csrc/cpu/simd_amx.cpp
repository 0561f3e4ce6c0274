// SPDX-License-Identifier: Apache-2.0

// The avx512_bf16 variant with its largest loop on the processor's tiles of AMX: 16 rows times 16
// keys times 32 elements in one instruction. Keys lie transposed in pairs of bfloat16, which is how
// the right factor of a tile product has to lie.

#include "build_config.h"

#if EMS_AMX_VARIANT
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "cpu/simd.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")

namespace ems::cpu {
namespace avx512_bf16 {
const Simd& variant();
}
namespace amx {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileWords = 16;  // of a row, and keys of a column of words
constexpr int64_t kMaxWords = 256;

// What the processor loads as the shape of its eight tiles: all are 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

// Tiles stay configured while this lives. Released after that: other libraries expect to find none,
// and a thread that has some costs the system more to switch.
class Tiles {
 public:
  Tiles() {
    static constexpr TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// ROW_TILES tiles of rows, 1 or 2, times two of keys, so that what is loaded is used twice.
template <int ROW_TILES>
inline void multiply_tiles(const float* rows, int64_t num_words, const float* keys,
                           float* products) {
  constexpr int64_t kKeyBytes = kTileKeys * sizeof(float);
  const int64_t row_bytes = num_words * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (ROW_TILES == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t w = 0; w < num_words; w += kTileWords) {
    _tile_loadd(4, rows + w, row_bytes);
    _tile_loadd(6, keys + w * kTileKeys, kKeyBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, keys + w * kTileKeys + kTileWords, kKeyBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (ROW_TILES == 2) {
      _tile_loadd(5, rows + kTileRows * num_words + w, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, products, kKeyBytes);
  _tile_stored(1, products + kTileWords, kKeyBytes);
  if constexpr (ROW_TILES == 2) {
    float* second = products + kTileRows * kTileKeys;
    _tile_stored(2, second, kKeyBytes);
    _tile_stored(3, second + kTileWords, kKeyBytes);
  }
}

void multiply_bfloat16(const float* rows, int64_t num_rows, int64_t num_words, const float* tile,
                       float* products) {
  // Tiles of fewer words would have to be configured for their own sake.
  if (num_words % kTileWords != 0 || num_words > kMaxWords) {
    avx512_bf16::variant().multiply_bfloat16(rows, num_rows, num_words, tile, products);
    return;
  }
  const int64_t num_whole = num_rows / kTileRows * kTileRows;
  const int64_t num_rest = num_rows - num_whole;
  // Rows that do not fill a tile, filled up.
  alignas(64) float rest[kTileRows * kMaxWords];
  alignas(64) float of_rest[kTileRows * kTileKeys];
  if (num_rest > 0) {
    const float* first = rows + num_whole * num_words;
    std::fill(std::copy_n(first, num_rest * num_words, rest), rest + kTileRows * num_words, 0.0f);
  }
  {
    const Tiles tiles;
    static_assert(kTileKeys % (2 * kTileWords) == 0);
    for (int64_t key = 0; key < kTileKeys; key += 2 * kTileWords) {
      int64_t row = 0;
      for (; row + 2 * kTileRows <= num_whole; row += 2 * kTileRows) {
        multiply_tiles<2>(rows + row * num_words, num_words, tile + key,
                          products + row * kTileKeys + key);
      }
      if (row < num_whole) {
        multiply_tiles<1>(rows + row * num_words, num_words, tile + key,
                          products + row * kTileKeys + key);
      }
      if (num_rest > 0) multiply_tiles<1>(rest, num_words, tile + key, of_rest + key);
    }
  }
  std::copy_n(of_rest, num_rest * kTileKeys, products + num_whole * kTileKeys);
}

}  // namespace

// Linux gives a process the registers of tiles when it asks for them.
bool is_permitted() {
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Simd& variant() {
  static const Simd simd = [] {
    Simd changed = avx512_bf16::variant();
    changed.name = "amx";
    changed.multiply_bfloat16 = multiply_bfloat16;
    return changed;
  }();
  return simd;
}

}  // namespace amx
}  // namespace ems::cpu
#endif
