// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "ems/paged_kv.h"

// Checks of index values. Only the CPU kernels make them: on a GPU reading an index would stall it.
namespace ems::cpu {

class IndexChecks {
 public:
  explicit IndexChecks(const char* op) : op_(op) {}

  void in_range(const char* name, int64_t row, int64_t value, int64_t low, int64_t high) const {
    if (low <= value && value <= high) return;
    fail(std::string(name) + "[" + std::to_string(row) + "]", range(low, high), value);
  }

  void in_range(const char* name, int64_t row, int64_t column, int64_t value, int64_t low,
                int64_t high) const {
    if (low <= value && value <= high) return;
    fail(element(name, row, column), range(low, high), value);
  }

  void multiple_of(const char* name, int64_t row, int64_t column, int64_t value,
                   int64_t divisor) const {
    if (value % divisor == 0) return;
    fail(element(name, row, column), "a multiple of " + std::to_string(divisor), value);
  }

  // The blocks of columns first..end-1 of a row exist.
  void blocks(const char* name, const BlockTable& table, int64_t row, int64_t first, int64_t end,
              int64_t num_blocks) const {
    for (int64_t column = first; column < end; ++column) {
      in_range(name, row, column, table.at(row, column), 0, num_blocks - 1);
    }
  }

  // The blocks that hold the first num_entries entries of a row exist.
  void entries(const char* name, const BlockTable& table, int64_t row, int64_t num_entries,
               const PagedTensor& cache) const {
    blocks(name, table, row, 0, (num_entries + cache.block_size - 1) / cache.block_size,
           cache.num_blocks);
  }

 private:
  static std::string element(const char* name, int64_t row, int64_t column) {
    return std::string(name) + "[" + std::to_string(row) + ", " + std::to_string(column) + "]";
  }

  static std::string range(int64_t low, int64_t high) {
    return "in " + std::to_string(low) + ".." + std::to_string(high);
  }

  [[noreturn]] void fail(const std::string& what, const std::string& expected,
                         int64_t value) const {
    throw std::runtime_error(std::string("ems_vllm::") + op_ + ": " + what + " must be " +
                             expected + ", got " + std::to_string(value));
  }

  const char* op_;
};

}  // namespace ems::cpu
