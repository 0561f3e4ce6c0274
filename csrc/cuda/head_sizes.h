// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

namespace ems::cuda {

// Head sizes that the CUDA kernels are compiled for, ascending; on a GPU there are no others. The
// Python side asks for them before it compresses a layer: build_info()["cuda_head_sizes"].
using HeadSizes = std::integer_sequence<int, 64, 80, 96, 128, 256>;

}  // namespace ems::cuda
