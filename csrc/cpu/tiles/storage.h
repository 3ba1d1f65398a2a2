// How the tensors, of any dtype and stride, become dense blocks of the accumulation dtype T and back.
#pragma once

#include <type_traits>

#include "cpu/simd/numbers.h"
#include "cpu/tiles/buffer.h"
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

// The same for a dtype of 16 bits, and nothing for any other.
template <class Body>
inline void with_16_bits(DType dtype, const Body& body) {
  if (dtype == DType::kFloat16) body(static_cast<Half*>(nullptr));
  if (dtype == DType::kBFloat16) body(static_cast<BFloat16*>(nullptr));
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
    if (from.column_stride == 1 && from.row_stride == columns && stride == columns) return read_row<T>(data, rows * columns, to);
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
    if (stride == columns && to_stride == columns) return write_row<T>(from, rows * columns, data);
    for (int64_t r = 0; r < rows; ++r) write_row<T>(from + r * stride, columns, data + r * to_stride);
  });
}

// What rounding took from `from`, after write_rows: the remainders of `rounded`, whose rows, like those of `to`, are consecutive.
template <class T>
inline void write_remainders(const T* from, int64_t stride, int64_t rows, int64_t columns, const void* rounded, void* to, DType dtype,
                             int64_t offset) {
  with_16_bits(dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    const auto* numbers = static_cast<const Storage*>(rounded) + offset;
    auto* remainders = static_cast<RemainderOf<Storage>*>(to) + offset;
    for (int64_t r = 0; r < rows; ++r, from += stride, numbers += columns, remainders += columns) {
      int64_t c = 0;
      if constexpr (kByVector<T, Storage>) {
        for (; c + kLanes<T> <= columns; c += kLanes<T>) store_remainders(remainders + c, load(from + c), numbers + c);
      }
      for (; c < columns; ++c) remainders[c] = remainder_of(static_cast<float>(from[c]), numbers[c]);
    }
  });
}

// to[r] = row r of what was written so, before it was rounded; columns up to `stride` are 0.
template <class T>
inline void read_unrounded(const void* rounded, const void* remainder, DType dtype, int64_t offset, int64_t rows, int64_t columns, T* to,
                           int64_t stride) {
  with_16_bits(dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    const auto* numbers = static_cast<const Storage*>(rounded) + offset;
    const auto* remainders = static_cast<const RemainderOf<Storage>*>(remainder) + offset;
    for (int64_t r = 0; r < rows; ++r, to += stride, numbers += columns, remainders += columns) {
      int64_t c = 0;
      if constexpr (kByVector<T, Storage>) {
        for (; c + kLanes<T> <= columns; c += kLanes<T>) store(to + c, load_unrounded(numbers + c, remainders + c));
      }
      for (; c < columns; ++c) to[c] = static_cast<T>(unrounded(numbers[c], remainders[c]));
      fill<T>(to + columns, stride - columns, T(0));
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
