// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/simd.h"
#include "ems/items.h"

namespace ems::cpu {

// Calls f(item) for every item in 0..num_items-1 on torch's threads. Threads take the next item
// when they are done with one, since items differ in size; so an item must write what no other
// writes.
template <typename F>
void parallel_items(int64_t num_items, const F& f) {
  // Chosen here, where an error still reaches the caller with its message.
  simd();
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t item = next++; item < num_items; item = next++) f(item);
  };
  const int64_t num_threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, std::min(num_items, num_threads), 1, work);
}

// Calls f(item) for every kv_head of every row of every layer.
template <typename COUNTS, typename F>
void parallel_heads(const COUNTS& counts, const F& f) {
  parallel_items(num_items(counts), [&](int64_t index) { f(item_at(counts, index)); });
}

}  // namespace ems::cpu
