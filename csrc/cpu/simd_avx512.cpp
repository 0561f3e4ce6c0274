// SPDX-License-Identifier: Apache-2.0

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
#include "cpu/simd_variant.inl"
#endif
