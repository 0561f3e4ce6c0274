// SPDX-License-Identifier: Apache-2.0

// One item per layer, row and kv_head.

#include <cmath>
#include <vector>

#include "cpu/entry_checks.h"
#include "cpu/parallel.h"
#include "cpu/row_vectors.h"
#include "dispatch.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

template <typename T>
void norms_of_head(const VectorNormsParams& p, const Item& item) {
  std::vector<float> vector(p.head_size);
  float* norms = p.norms.at(item.layer, item.row, item.head);
  const int64_t num_entries = p.num_entries[item.row];
  RowVectors<T> vectors(p.cache, p.block_table, item, num_entries, p.head_size);
  for (int64_t entry = 0; entry < num_entries; ++entry) {
    convert(vectors.at(entry), p.head_size, 1.0f, vector.data());
    norms[entry] = std::sqrt(simd().dot(vector.data(), vector.data(), p.head_size));
  }
  std::fill(norms + num_entries, norms + p.norms.length, 0.0f);
}

}  // namespace

void vector_norms(const VectorNormsParams& p) {
  check_entries("vector_norms", p, p.cache, p.norms.length);
  dispatch_cache_dtype(p.dtype, [&](auto element) {
    parallel_heads(p, [&](const Item& item) { norms_of_head<decltype(element)>(p, item); });
  });
}

}  // namespace ems::cpu
