// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "ems/params.h"

// Argument checks of the operators, and the conversion of checked tensors to torch-free views. A
// message names the operator, the argument, what was expected and what was given.
namespace ems {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In an expected shape: any size.
constexpr int64_t kAny = -1;

class ArgumentChecks {
 public:
  // The device of `first` is the device of all.
  ArgumentChecks(const char* op, const Tensor& first)
      : op_(op), is_cpu_(first.is_cpu()), device_index_(first.get_device_index()) {}

  bool is_cpu() const { return is_cpu_; }
  int32_t device_index() const { return device_index_; }

  template <typename... ARGS>
  [[noreturn]] void fail(const ARGS&... parts) const {
    std::ostringstream message;
    message << "ems_vllm::" << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  template <typename... ARGS>
  void require(bool condition, const ARGS&... parts) const {
    if (!condition) fail(parts...);
  }

  // The factor on products before a softmax.
  float scale(double value) const {
    require(value >= 0, "scale must be at least 0, got ", value);
    return static_cast<float>(value);
  }

  // The dtype of a float argument, which the other float arguments must share.
  DType float_dtype(const char* name, const Tensor& tensor) const {
    const std::optional<DType> dtype = dtype_of(tensor);
    require(dtype.has_value() && *dtype != DType::kFloat8E4M3, name,
            " must have dtype float32, bfloat16 or float16, got ", tensor.scalar_type());
    return *dtype;
  }

  // The dtype of a cache: a float, or float8_e4m3fn.
  DType cache_dtype(const char* name, const Tensor& tensor) const {
    const std::optional<DType> dtype = dtype_of(tensor);
    require(dtype.has_value(), name,
            " must have dtype float32, bfloat16, float16 or float8_e4m3fn, got ",
            tensor.scalar_type());
    return *dtype;
  }

  // Device, dtype and shape.
  void strided(const char* name, const Tensor& tensor, ScalarType dtype,
               std::initializer_list<int64_t> shape) const {
    require(tensor.is_cpu() == is_cpu_ && tensor.get_device_index() == device_index_, name,
            " must be on the device of the other arguments");
    require(tensor.scalar_type() == dtype, name, " must have dtype ", dtype, ", got ",
            tensor.scalar_type());
    bool matches = tensor.dim() == static_cast<int64_t>(shape.size());
    for (int64_t i = 0; matches && i < tensor.dim(); ++i) {
      const int64_t size = shape.begin()[i];
      matches = size == kAny || size == tensor.size(i);
    }
    require(matches, name, " must have shape ", Shape{shape}, ", got ", Shape{tensor.sizes()});
  }

  // Device, dtype, shape, and a last dimension without gaps.
  void tensor(const char* name, const Tensor& tensor, ScalarType dtype,
              std::initializer_list<int64_t> shape) const {
    strided(name, tensor, dtype, shape);
    const int64_t last = tensor.dim() - 1;
    require(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
            " must be contiguous in its last dimension, got stride ", tensor.stride(last));
  }

  // A vector of int32, one element per row.
  const int32_t* row_values(const char* name, const Tensor& tensor, int64_t num_rows) const {
    this->tensor(name, tensor, ScalarType::Int, {num_rows});
    return static_cast<const int32_t*>(tensor.const_data_ptr());
  }

  BlockTable block_table(const char* name, const Tensor& tensor, int64_t num_rows) const {
    this->tensor(name, tensor, ScalarType::Int, {num_rows, kAny});
    return {static_cast<const int32_t*>(tensor.const_data_ptr()), tensor.size(1), tensor.stride(0)};
  }

  // A cache of one layer [num_blocks, num_kv_heads, block_size, head_size] or of several, with
  // num_layers in front.
  PagedTensor cache(const char* name, const Tensor& tensor, ScalarType dtype,
                    std::initializer_list<int64_t> shape) const {
    this->tensor(name, tensor, dtype, shape);
    return paged(name, tensor, tensor.dim() - 4, tensor.dim() == 5);
  }

  // Scores of one layer [num_pages, num_kv_heads, block_size] or of several, with num_layers in
  // front.
  PagedTensor scores(const char* name, const Tensor& tensor,
                     std::initializer_list<int64_t> shape) const {
    this->tensor(name, tensor, ScalarType::Float, shape);
    return paged(name, tensor, tensor.dim() - 3, tensor.dim() == 4);
  }

  template <typename T>
  HeadRows<T> head_rows(const char* name, const Tensor& tensor, ScalarType dtype,
                        int64_t num_layers, int64_t num_rows, int64_t num_kv_heads) const {
    this->tensor(name, tensor, dtype, {num_layers, num_rows, num_kv_heads, kAny});
    return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.size(3), tensor.stride(0),
            tensor.stride(1), tensor.stride(2)};
  }

  // A square matrix for every head, without gaps between its rows.
  template <typename T>
  HeadRows<T> head_matrices(const char* name, const Tensor& tensor, int64_t num_layers,
                            int64_t num_rows, int64_t num_kv_heads, int64_t size) const {
    this->tensor(name, tensor, ScalarType::Float, {num_layers, num_rows, num_kv_heads, size, size});
    require(size <= 1 || tensor.stride(3) == size, name,
            " must be contiguous in its last two dimensions, got stride ", tensor.stride(3));
    return {static_cast<T*>(tensor.mutable_data_ptr()), size * size, tensor.stride(0),
            tensor.stride(1), tensor.stride(2)};
  }

  // What RoPE did to keys of a head_size; nothing where there is no table.
  KeyRotation rotation(const char* name, const std::optional<Tensor>& cos_sin, bool is_neox,
                       int64_t head_size) const {
    if (!cos_sin.has_value()) return {};
    const DType dtype = float_dtype(name, *cos_sin);
    tensor(name, *cos_sin, cos_sin->scalar_type(), {kAny, kAny});
    const int64_t rotary_dim = cos_sin->size(1);
    require(rotary_dim % 2 == 0 && rotary_dim <= head_size, name,
            " must have an even number of columns, at most head_size (", head_size, "), got ",
            rotary_dim);
    return {cos_sin->const_data_ptr(),
            dtype,
            is_neox,
            static_cast<int32_t>(rotary_dim / 2),
            cos_sin->size(0),
            cos_sin->stride(0)};
  }

  void same_length(const char* name, const Tensor& tensor, const char* other_name,
                   const Tensor& other) const {
    const int64_t last = tensor.dim() - 1;
    require(tensor.size(last) == other.size(last), name, " must be as long as ", other_name, " (",
            other.size(last), "), got ", tensor.size(last));
  }

  // Query heads are divided evenly among kv_heads.
  void head_groups(int64_t num_heads, int64_t num_kv_heads) const {
    require(num_kv_heads > 0 && num_heads > 0 && num_heads % num_kv_heads == 0,
            "the number of heads must be a multiple of the number of kv_heads (", num_kv_heads,
            "), got ", num_heads);
  }

 private:
  // None for a dtype that no kernel knows.
  static std::optional<DType> dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      case ScalarType::Float8_e4m3fn:
        return DType::kFloat8E4M3;
      default:
        return std::nullopt;
    }
  }

  template <typename SIZES>
  struct Shape {
    SIZES sizes;
    friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
      const char* separator = "";
      out << "[";
      for (const int64_t size : shape.sizes) {
        out << separator;
        separator = ", ";
        if (size == kAny) {
          out << "*";
        } else {
          out << size;
        }
      }
      return out << "]";
    }
  };

  PagedTensor paged(const char* name, const Tensor& tensor, int64_t block_dim,
                    bool has_layers) const {
    require(tensor.size(block_dim + 2) > 0, name, " must have a block_size of at least 1, got 0");
    return {tensor.mutable_data_ptr(),   tensor.size(block_dim),
            tensor.size(block_dim + 2),  has_layers ? tensor.stride(0) : 0,
            tensor.stride(block_dim),    tensor.stride(block_dim + 1),
            tensor.stride(block_dim + 2)};
  }

  const char* op_;
  bool is_cpu_;
  int32_t device_index_;
};

}  // namespace ems
