// Numbers as a kernel computes with them and as tensors store them, on the device and on a host that emulates it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SMATTN_DEVICE __device__ __forceinline__
#define SMATTN_UNROLL _Pragma("unroll")
#define SMATTN_ROLLED _Pragma("unroll 1")
#else
#define SMATTN_DEVICE inline
#define SMATTN_UNROLL
#define SMATTN_ROLLED
#endif

namespace smattn::cuda {

#ifdef __CUDACC__

SMATTN_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
SMATTN_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
SMATTN_DEVICE void round_to(Half& to, float x) { to.bits = __half_as_ushort(__float2half_rn(x)); }
SMATTN_DEVICE void round_to(BFloat16& to, float x) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

SMATTN_DEVICE int16_t remainder_of(float x, BFloat16 rounded) { return remainder_of_bits(__float_as_uint(x), rounded); }
SMATTN_DEVICE Half remainder_of(float x, Half rounded) {
  Half remainder;
  round_to(remainder, (x - to_float(rounded)) * kRemainderScale);
  return remainder;
}
SMATTN_DEVICE float unrounded(BFloat16 rounded, int16_t remainder) { return __uint_as_float(unrounded_bits(rounded, remainder)); }
SMATTN_DEVICE float unrounded(Half rounded, Half remainder) { return to_float(rounded) + to_float(remainder) / kRemainderScale; }

#else

inline float to_float(Half x) { return widen(x); }
inline float to_float(BFloat16 x) { return widen(x); }
inline void round_to(Half& to, float x) { narrow(x, to); }
inline void round_to(BFloat16& to, float x) { narrow(x, to); }

#endif

SMATTN_DEVICE float to_float(float x) { return x; }
SMATTN_DEVICE float to_float(double x) { return static_cast<float>(x); }
SMATTN_DEVICE void round_to(float& to, float x) { to = x; }
SMATTN_DEVICE void round_to(double& to, float x) { to = x; }

template <class T>
SMATTN_DEVICE T rounded(float x) {
  T y;
  round_to(y, x);
  return y;
}

// What of a float32 is stored in 16 bits.
struct AsRounded {
  template <class T>
  static SMATTN_DEVICE uint16_t bits(float x) {
    return rounded<T>(x).bits;
  }
};
struct AsRemainder {
  template <class T>
  static SMATTN_DEVICE uint16_t bits(float x) {
    return bits_of(remainder_of(x, rounded<T>(x)));
  }

 private:
  static SMATTN_DEVICE uint16_t bits_of(Half x) { return x.bits; }
  static SMATTN_DEVICE uint16_t bits_of(int16_t x) { return static_cast<uint16_t>(x); }
};

// Two neighbours of a 16-bit type in one register, the first in the low half.
template <class T, class What = AsRounded>
SMATTN_DEVICE uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(What::template bits<T>(low)) | static_cast<uint32_t>(What::template bits<T>(high)) << 16;
}

}  // namespace smattn::cuda
