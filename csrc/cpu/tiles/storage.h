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

template <class Storage>
constexpr Storage kInfinity = static_cast<Storage>(__builtin_inf());
template <>
constexpr BFloat16 kInfinity<BFloat16> = {0x7f80};

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

// vector(c) for whole vectors of n numbers, the last of which may lie over the one before. Returns how many numbers that was: n, or 0 if
// they are fewer than a vector or do not go by vectors.
template <class T, class Storage, class Vector>
inline int64_t by_vectors(int64_t n, const Vector& vector) {
  if constexpr (kByVector<T, Storage>) {
    if (n < kLanes<T>) return 0;
    int64_t c = 0;
    for (; c + kLanes<T> <= n; c += kLanes<T>) vector(c);
    if (c < n) vector(n - kLanes<T>);
    return n;
  }
  return 0;
}

// Whether p[0 .. n) are finite, asked of their bits: compilers make vectors of that.
template <class Storage>
inline bool all_finite(const Storage* p, int64_t n) {
  using Word = std::conditional_t<sizeof(Storage) == 2, uint16_t, std::conditional_t<sizeof(Storage) == 4, uint32_t, uint64_t>>;
  constexpr Word kMagnitude = static_cast<Word>(~Word{0}) >> 1;
  Word largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Word magnitude = __builtin_bit_cast(Word, p[i]) & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < __builtin_bit_cast(Word, kInfinity<Storage>);
}

// to[0 .. columns) = from[0 .. columns)
template <class T, class Storage>
inline void read_row(const Storage* from, int64_t columns, T* to) {
  int64_t c = by_vectors<T, Storage>(columns, [=](auto at) { store(to + at, load_widened(from + at)); });
  for (; c < columns; ++c) to[c] = static_cast<T>(widen(from[c]));
}

template <class T, class Storage>
inline void write_row(const T* from, int64_t columns, Storage* to) {
  int64_t c = by_vectors<T, Storage>(columns, [=](auto at) { store_narrowed(to + at, load(from + at)); });
  for (; c < columns; ++c) narrow(from[c], to[c]);
}

// Clears row[columns .. stride) before the row is filled: the first vector may begin before `columns`.
template <class T>
inline void clear_beyond(int64_t columns, int64_t stride, T* row) {
  int64_t c = columns / kLanes<T> * kLanes<T>;
  for (; c + kLanes<T> <= stride; c += kLanes<T>) store(row + c, Vec<T>{});
  fill<T>(row + c, stride - c, T(0));
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
      clear_beyond(columns, stride, row);
      if (from.column_stride == 1) {
        read_row<T>(source, columns, row);
      } else {
        for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<T>(widen(source[c * from.column_stride]));
      }
    }
  });
}

// from[r][0 .. columns) to rows `to_stride` elements apart, the first of which starts at element `offset`.
template <class T>
inline void write_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, void* to, DType dtype, int64_t offset,
                       int64_t to_stride) {
  with_storage(dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(to) + offset;
    if (stride == columns && to_stride == columns) return write_row<T>(from, rows * columns, data);
    for (int64_t r = 0; r < rows; ++r) write_row<T>(from + r * stride, columns, data + r * to_stride);
  });
}

// from[0 .. count) to elements from `offset` on, past the caches: by whole vectors of memory, and those around them as usual.
template <class T>
inline void stream_numbers(const T* from, int64_t count, void* to, DType dtype, int64_t offset) {
  with_storage(dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    auto* numbers = static_cast<Storage*>(to) + offset;
    int64_t c = 0;
    if constexpr (kStreams<T, Storage>) {
      constexpr int64_t kSize = sizeof(Storage), kWhole = kVectorBytes / kSize;
      c = smaller_of<int64_t>(count, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(numbers) % kVectorBytes) / kSize);
      write_row<T>(from, c, numbers);
      for (; c + kWhole <= count; c += kWhole) stream_narrowed(numbers + c, from + c);
    }
    write_row<T>(from + c, count - c, numbers + c);
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
      int64_t c = by_vectors<T, Storage>(columns, [=](auto at) { store_remainders(remainders + at, load(from + at), numbers + at); });
      for (; c < columns; ++c) remainders[c] = remainder_of(static_cast<float>(from[c]), numbers[c]);
    }
  });
}

// The rows that write_rows and write_remainders have stored, as they were before rounding; columns up to `stride` are 0.
template <class T>
inline void read_unrounded(const void* rounded, const void* remainder, DType dtype, int64_t offset, int64_t rows, int64_t columns, T* to,
                           int64_t stride) {
  with_16_bits(dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    const auto* numbers = static_cast<const Storage*>(rounded) + offset;
    const auto* remainders = static_cast<const RemainderOf<Storage>*>(remainder) + offset;
    for (int64_t r = 0; r < rows; ++r, to += stride, numbers += columns, remainders += columns) {
      clear_beyond(columns, stride, to);
      int64_t c = by_vectors<T, Storage>(columns, [=](auto at) { store(to + at, load_unrounded(numbers + at, remainders + at)); });
      for (; c < columns; ++c) to[c] = static_cast<T>(unrounded(numbers[c], remainders[c]));
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
