// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <limits>

#include "cpu/simd.h"

// Vectors of 4: SSE2 and NEON have them.
#define EMS_VARIANT portable
#define EMS_VARIANT_NAME "portable"
#define EMS_LANES 4
#define EMS_ROWS 4
#include "cpu/simd_variant.inl"
