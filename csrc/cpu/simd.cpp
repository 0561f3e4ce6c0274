// SPDX-License-Identifier: Apache-2.0

#include "cpu/simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "build_config.h"

namespace ems::cpu {

namespace portable {
extern const Simd kSimd;
}
#if EMS_X86_VARIANTS
namespace avx2 {
extern const Simd kSimd;
}
namespace avx512 {
extern const Simd kSimd;
}
namespace avx512_bf16 {
const Simd& variant();
}
#endif
#if EMS_AMX_VARIANT
namespace amx {
bool is_permitted();
const Simd& variant();
}  // namespace amx
#endif

namespace {

bool is_wanted(const Simd& variant) {
  const char* name = std::getenv("EMS_CPU_VARIANT");
  return name == nullptr || name == std::string(variant.name);
}

const Simd& choose() {
#if EMS_X86_VARIANTS
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#if EMS_AMX_VARIANT
  const bool has_amx = has_bf16 && __builtin_cpu_supports("amx-bf16") && amx::is_permitted();
  if (has_amx && has_avx2 && is_wanted(amx::variant())) return amx::variant();
#endif
  if (has_bf16 && has_avx2 && is_wanted(avx512_bf16::variant())) return avx512_bf16::variant();
  if (has_avx512 && has_avx2 && is_wanted(avx512::kSimd)) return avx512::kSimd;
  if (has_avx2 && is_wanted(avx2::kSimd)) return avx2::kSimd;
#endif
  if (is_wanted(portable::kSimd)) return portable::kSimd;
  throw std::runtime_error(std::string("EMS_CPU_VARIANT=") + std::getenv("EMS_CPU_VARIANT") +
                           " names no variant that this build has and this processor runs; "
                           "unset it to use the best one");
}

}  // namespace

const Simd& simd() {
  static const Simd& chosen = choose();
  return chosen;
}

}  // namespace ems::cpu
