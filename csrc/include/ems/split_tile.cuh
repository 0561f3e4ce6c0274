// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ems/device.cuh"
#include "ems/tile.cuh"

// Products of float32 vectors on tensor cores. A value is the sum of two of bfloat16, which leave
// 2^-17 of it out, and a product that of three of theirs: the fourth is as small as what is left
// out.
namespace ems {

// Four 8x8 matrices of both parts.
struct SplitFragment {
  uint32_t high[4];
  uint32_t low[4];
};

// c += a b, with the first or the second half of b.
EMS_DEVICE void multiply_add_split(float (&c)[4], const SplitFragment& a, const SplitFragment& b,
                                   int half) {
  device::multiply_add<BFloat16>(c, a.low, b.high[2 * half], b.high[2 * half + 1]);
  device::multiply_add<BFloat16>(c, a.high, b.low[2 * half], b.low[2 * half + 1]);
  device::multiply_add<BFloat16>(c, a.high, b.high[2 * half], b.high[2 * half + 1]);
}

template <int HEAD_SIZE, int NUM_ROWS>
struct SplitTile {
  using Part = Tile<BFloat16, HEAD_SIZE, NUM_ROWS>;
  Part high;
  Part low;

  EMS_DEVICE void set(int row, int column, float value) {
    const int index = row * Part::kStride + column;
    high.elements[index] = device::round_to<BFloat16>(value);
    low.elements[index] = device::round_to<BFloat16>(value - device::widen(high.elements[index]));
  }

  // Rows as the left operand: 16 of them, 16 columns.
  EMS_DEVICE void load_left(int first_row, int first_column, SplitFragment* out) const {
    const int lane = device::thread_index() % device::kWarpSize;
    load(first_row + lane % 16, first_column + lane / 16 * 8, out);
  }

  // Rows as the right operand.
  EMS_DEVICE void load_right(int first_row, int first_column, SplitFragment* out) const {
    const int lane = device::thread_index() % device::kWarpSize;
    load(first_row + lane % 8 + lane / 16 * 8, first_column + lane / 8 % 2 * 8, out);
  }

  // Columns as the left operand: 16 of them, over 16 rows.
  EMS_DEVICE void load_left_columns(int first_column, int first_row, SplitFragment* out) const {
    const int lane = device::thread_index() % device::kWarpSize;
    load_columns(first_row + lane % 8 + lane / 16 * 8, first_column + lane / 8 % 2 * 8, out);
  }

  // Columns as the right operand.
  EMS_DEVICE void load_right_columns(int first_column, int first_row, SplitFragment* out) const {
    const int lane = device::thread_index() % device::kWarpSize;
    load_columns(first_row + lane % 16, first_column + lane / 16 * 8, out);
  }

 private:
  EMS_DEVICE void load(int row, int column, SplitFragment* out) const {
    device::load_matrices(out->high, high.row(row) + column);
    device::load_matrices(out->low, low.row(row) + column);
  }

  EMS_DEVICE void load_columns(int row, int column, SplitFragment* out) const {
    device::load_matrices_transposed(out->high, high.row(row) + column);
    device::load_matrices_transposed(out->low, low.row(row) + column);
  }
};

}  // namespace ems
