// Between the tensors as they lie in memory, of any dtype and stride, and dense blocks of the accumulation dtype T.
#pragma once

#include <cstddef>
#include <new>

#include "cpu/simd/vec.h"
#include "params.h"

namespace smattn::cpu::SMATTN_UNIT {

// Scratch memory, aligned to a cache line, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : bytes_(size * static_cast<int64_t>(sizeof(T)) + 64),
        data_(static_cast<T*>(::operator new(static_cast<std::size_t>(bytes_), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  operator T*() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  int64_t bytes_;
  T* data_;
};

template <class... Holders>
inline int64_t bytes_in(const Holders&... holders) {
  return (holders.bytes() + ...);
}

template <class T>
inline void fill(T* p, int64_t n, T x) {
  for (int64_t i = 0; i < n; ++i) p[i] = x;
}

template <class T>
inline void copy(const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = (x.bits & 0x7fffu) << 13;
  const float magnitude = __builtin_bit_cast(float, rest) * 0x1p112f;  // moves the exponent's bias, subnormals included
  const uint32_t bits = rest >= 0x0f800000u ? rest | 0x7f800000u : __builtin_bit_cast(uint32_t, magnitude);  // infinity, NaN
  return __builtin_bit_cast(float, bits | sign);
}

// To nearest, ties to even.
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, double& to) { to = x; }
inline void narrow(double x, float& to) { to = static_cast<float>(x); }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, BFloat16& to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  to.bits = static_cast<uint16_t>(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u);
}
inline void narrow(float x, Half& to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), rest = bits & 0x7fffffffu;
  // below 2^-14 a half's steps are 2^-24, a float's between 1/2 and 1: adding 1/2 rounds to them
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t finite = rest < 0x38800000u ? subnormal : rest < 0x47800000u ? smaller_of(normal, 0x7c00u) : 0x7c00u;
  to.bits = static_cast<uint16_t>((rest > 0x7f800000u ? 0x7e00u : finite) | ((bits >> 16) & 0x8000u));
}
inline void narrow(double x, BFloat16& to) { narrow(static_cast<float>(x), to); }
inline void narrow(double x, Half& to) { narrow(static_cast<float>(x), to); }

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// body(a null pointer to the type that stores `dtype`)
template <class Body>
inline void with_storage(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(static_cast<float*>(nullptr));
    case DType::kFloat64: return body(static_cast<double*>(nullptr));
    case DType::kFloat16: return body(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return body(static_cast<BFloat16*>(nullptr));
  }
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
};

// A matrix inside a tensor: element (r, c) lies at offset + r * row_stride + c * column_stride.
struct Strided {
  const void* data;
  DType dtype;
  int64_t offset, row_stride, column_stride;

  Strided transposed() const { return {data, dtype, offset, column_stride, row_stride}; }
};

// The rows of head h that start at row `first`: [rows, head size].
inline Strided rows_of(const Tensor4& t, int64_t b, int64_t h, int64_t first) {
  return {t.data, t.dtype, b * t.stride[0] + h * t.stride[1] + first * t.stride[2], t.stride[2], t.stride[3]};
}

// to[r][c] = the matrix's (r, c); columns up to `stride` are 0.
template <class T>
inline void read_rows(const Strided& from, int64_t rows, int64_t columns, T* to, int64_t stride) {
  with_storage(from.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(const_cast<void*>(from.data)) + from.offset;
    for (int64_t r = 0; r < rows; ++r) {
      const auto* source = data + r * from.row_stride;
      T* row = to + r * stride;
      if (from.column_stride == 1) {
        for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<T>(widen(source[c]));
      } else {
        for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<T>(widen(source[c * from.column_stride]));
      }
      fill<T>(row + columns, stride - columns, T(0));
    }
  });
}

// from[r][0 .. columns) to consecutive rows of `columns` elements that start at element `offset`.
template <class T>
inline void write_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, void* to, DType dtype, int64_t offset,
                       int64_t to_stride) {
  with_storage(dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(to) + offset;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) narrow(from[r * stride + c], data[r * to_stride + c]);
    }
  });
}

// to[c][r] = from[r][c]; both hold whole vectors: rows and columns are rounded up to kLanes.
template <class T>
inline void transpose_block(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    for (int64_t c = 0; c < columns; c += W) {
      Vec<T> v[W];
      for (int i = 0; i < W; ++i) v[i] = load(from + (r + i) * from_stride + c);
      transpose<T>(v);
      for (int i = 0; i < W; ++i) store(to + (c + i) * to_stride + r, v[i]);
    }
  }
}

}  // namespace smattn::cpu::SMATTN_UNIT
