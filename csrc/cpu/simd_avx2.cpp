// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <limits>

#include "build_config.h"
#include "cpu/simd.h"

#if EMS_X86_VARIANTS
#pragma GCC target("avx2,fma,f16c")
#define EMS_VARIANT avx2
#define EMS_VARIANT_NAME "avx2"
#define EMS_LANES 8
#define EMS_ROWS 4
#include "cpu/simd_variant.inl"
#endif
