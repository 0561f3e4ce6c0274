// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

// Floats of 16 and 8 bits as storage, with conversions that compilers can vectorise on any target.
namespace ems {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinities, 0x7f is NaN, at most 448.
struct Float8E4M3 {
  uint8_t bits;
};

template <typename TO, typename FROM>
inline TO bit_cast(FROM from) {
  static_assert(sizeof(TO) == sizeof(FROM));
  TO to;
  std::memcpy(&to, &from, sizeof(TO));
  return to;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(Float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  // The product moves the exponent from bias 15 to bias 127 and is exact, subnormals included.
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  const uint32_t special = magnitude | 0x7f800000;
  const bool is_finite = magnitude < (0x7c00u << 13);
  return bit_cast<float>((is_finite ? finite : special) | sign);
}

inline float to_float(Float8E4M3 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7f) << 20;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x80) << 24;
  // As above, from bias 7.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p120f);
  const bool is_nan = magnitude == (0x7fu << 20);
  return bit_cast<float>((is_nan ? 0x7fc00000 : finite) | sign);
}

// The three below round to nearest even.
inline void from_float(float value, float* out) { *out = value; }

inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40);
}

inline void from_float(float value, Float16* out) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 puts the result in the low bits
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = sign | static_cast<uint16_t>(half);
}

// Saturates, infinities included, as vLLM does when it writes a cache.
inline void from_float(float value, Float8E4M3* out) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t rounded;
  if (magnitude > 0x7f800000) {
    rounded = 0x7f;
  } else if (magnitude >= 0x43e00000) {  // 448
    rounded = 0x7e;
  } else if (magnitude < 0x3c800000) {  // subnormal: adding 2^14 puts the result in the low bits
    rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000;
  } else {
    rounded = (magnitude - 0x3c000000 + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  }
  out->bits = sign | static_cast<uint8_t>(rounded);
}

}  // namespace ems
