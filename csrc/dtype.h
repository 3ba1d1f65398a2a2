// The dtypes of tensors, and how 16-bit numbers are stored and converted.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace smattn {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

SMATTN_HOST_DEVICE constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What stores the remainder of a number that was rounded to T.
template <class T>
using RemainderOf = std::conditional_t<std::is_same_v<T, BFloat16>, int16_t, T>;

// What rounding took from a number, in 16 bits of its own, is its remainder.
// Of bfloat16, the upper half of a float, that is the distance of their bits: the two are the float again. Only a tie that was rounded down
// is one more than 16 bits hold. NaN stays NaN, whatever its bits.
SMATTN_HOST_DEVICE constexpr int16_t remainder_of_bits(uint32_t unrounded, BFloat16 rounded) {
  const int32_t distance = static_cast<int32_t>(unrounded - (static_cast<uint32_t>(rounded.bits) << 16));
  return static_cast<int16_t>(distance < -0x8000 ? -0x8000 : distance > 0x7fff ? 0x7fff : distance);
}
SMATTN_HOST_DEVICE constexpr uint32_t unrounded_bits(BFloat16 rounded, int16_t remainder) {
  return (static_cast<uint32_t>(rounded.bits) << 16) + static_cast<uint32_t>(static_cast<int32_t>(remainder));
}
// Of float16 it is this times the difference, in float16.
constexpr float kRemainderScale = 256.0f;  // REMAINDER_SCALE of smattn/call.py

#ifndef __CUDACC__  // a device has instructions for these: csrc/cuda/numbers.h

SMATTN_HOST_DEVICE float widen(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
SMATTN_HOST_DEVICE float widen(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // Of subnormals there are 1023, in steps of 2^-24: counted, because a float that is subnormal itself is slow to multiply.
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  const uint32_t normal = (rest << 13) + 0x38000000u, not_finite = (rest << 13) | 0x7f800000u;
  const uint32_t bits = rest < 0x0400u ? subnormal : rest < 0x7c00u ? normal : not_finite;
  return __builtin_bit_cast(float, bits | sign);
}

// To nearest, ties to even.
SMATTN_HOST_DEVICE void narrow(float x, BFloat16& to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  to.bits = static_cast<uint16_t>(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u);
}
SMATTN_HOST_DEVICE void narrow(float x, Half& to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), rest = bits & 0x7fffffffu;
  // Below 2^-14 a half's steps are 2^-24, a float's between 1/2 and 1: adding 1/2 rounds to them.
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t infinite = 0x7c00u, bounded = normal < infinite ? normal : infinite;
  const uint32_t finite = rest < 0x38800000u ? subnormal : rest < 0x47800000u ? bounded : infinite;
  to.bits = static_cast<uint16_t>((rest > 0x7f800000u ? 0x7e00u : finite) | ((bits >> 16) & 0x8000u));
}

SMATTN_HOST_DEVICE int16_t remainder_of(float x, BFloat16 rounded) { return remainder_of_bits(__builtin_bit_cast(uint32_t, x), rounded); }
SMATTN_HOST_DEVICE Half remainder_of(float x, Half rounded) {
  Half remainder;
  narrow((x - widen(rounded)) * kRemainderScale, remainder);
  return remainder;
}
SMATTN_HOST_DEVICE float unrounded(BFloat16 rounded, int16_t remainder) {
  return __builtin_bit_cast(float, unrounded_bits(rounded, remainder));
}
SMATTN_HOST_DEVICE float unrounded(Half rounded, Half remainder) { return widen(rounded) + widen(remainder) / kRemainderScale; }

#endif

}  // namespace smattn
