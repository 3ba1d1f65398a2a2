// How the tensors, of any dtype and stride, become dense blocks of the accumulation dtype T and back.
#pragma once

#include <type_traits>

#include "cpu/tiles/buffer.h"
#include "dtype.h"
#include "params.h"

namespace smattn::cpu::SMATTN_UNIT {

// The conversions of dtype.h, for every dtype. A double is rounded to 16 bits by way of float.
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, double& to) { to = x; }
inline void narrow(double x, float& to) { to = static_cast<float>(x); }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(double x, BFloat16& to) { narrow(static_cast<float>(x), to); }
inline void narrow(double x, Half& to) { narrow(static_cast<float>(x), to); }

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

// The same by the vector, for numbers that lie side by side in storage. A compiler left to vectorise such a loop first tests what may overlap,
// which takes as long as a short row. bfloat16 with AVX-512 alone: two vectors of AVX2 at a time, as compilers do it, are faster than one.
inline Vec<float> load_widened(const float* p) { return load(p); }
inline Vec<double> load_widened(const double* p) { return load(p); }
inline void store_narrowed(float* p, Vec<float> x) { store(p, x); }
inline void store_narrowed(double* p, Vec<double> x) { store(p, x); }
template <class T, class Storage>
constexpr bool kByVector = std::is_same_v<T, Storage>;
#if defined(__AVX512F__)
template <>
constexpr bool kByVector<float, BFloat16> = true;
typedef uint32_t WordsOf32 __attribute__((vector_size(kVectorBytes)));
inline Vec<float> load_widened(const BFloat16* p) {  // the maskz forms, because gcc 12 warns inside the plain ones
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec<float>)((WordsOf32)_mm512_maskz_cvtepu16_epi32(0xffff, bits) << 16);
}
inline void store_narrowed(BFloat16* p, Vec<float> x) {
  const WordsOf32 bits = (WordsOf32)x, nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordsOf32 numbers = x == x ? nearest : WordsOf32{} + 0x7fc0u;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)numbers));
}
#endif

// to[0 .. columns) = from[0 .. columns)
template <class T, class Storage>
inline void read_row(const Storage* from, int64_t columns, T* to) {
  int64_t c = 0;
  if constexpr (kByVector<T, Storage>) {
    for (; c + kLanes<T> <= columns; c += kLanes<T>) store(to + c, load_widened(from + c));
  }
  for (; c < columns; ++c) to[c] = static_cast<T>(widen(from[c]));
}

template <class T, class Storage>
inline void write_row(const T* from, int64_t columns, Storage* to) {
  int64_t c = 0;
  if constexpr (kByVector<T, Storage>) {
    for (; c + kLanes<T> <= columns; c += kLanes<T>) store_narrowed(to + c, load(from + c));
  }
  for (; c < columns; ++c) narrow(from[c], to[c]);
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
        read_row<T>(source, columns, row);
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
    for (int64_t r = 0; r < rows; ++r) write_row<T>(from + r * stride, columns, data + r * to_stride);
  });
}

// kRemainderScale times what write_rows rounds away, in the same dtype, to consecutive rows of `columns` elements that start at element `offset`.
template <class T>
inline void write_remainders(const T* from, int64_t stride, int64_t rows, int64_t columns, void* to, DType dtype, int64_t offset) {
  with_storage(dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(to) + offset;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t c = 0;
      if constexpr (kByVector<T, std::remove_pointer_t<decltype(type)>>) {
        for (; c + kLanes<T> <= columns; c += kLanes<T>) {
          auto* to_vector = data + r * columns + c;
          const Vec<T> x = load(from + r * stride + c);
          store_narrowed(to_vector, x);  // then its rounding is known
          store_narrowed(to_vector, (x - load_widened(to_vector)) * static_cast<T>(kRemainderScale));
        }
      }
      for (; c < columns; ++c) {
        const T x = from[r * stride + c];
        std::remove_pointer_t<decltype(type)> rounded;
        narrow(x, rounded);
        narrow(static_cast<T>((x - widen(rounded)) * kRemainderScale), data[r * columns + c]);
      }
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
