// What the products multiply, as elements E: of the accumulation type T as they are, or pairs of bfloat16.
// A row of n numbers takes row_elements(n) elements, whole vectors; numbers beyond the last are 0.
#pragma once

#include "cpu/simd/few_queries.h"
#include "cpu/simd/product_tiles.h"
#include "cpu/tiles/storage.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class E>
inline int64_t packed(int64_t n) {
  return blocks_of(n, kStepsPerElement<E>);
}
template <class E>
inline int64_t row_elements(int64_t n) {
  return round_up(packed<E>(n), kLanes<E>);
}

// to[r] = the matrix's row r.
template <class E>
inline void copy_rows(const Strided& from, int64_t rows, int64_t columns, E* to) {
  const int64_t stride = row_elements<E>(columns);
  if constexpr (kStepsPerElement<E> == 1) {
    read_rows<E>(from, rows, columns, to, stride);
  } else {
    const auto* data = static_cast<const BFloat16*>(from.data) + from.offset;
    for (int64_t r = 0; r < rows; ++r) {
      auto* row = reinterpret_cast<char*>(to + r * stride);  // a char may alias what is read as pairs
      const BFloat16* source = data + r * from.row_stride;
      const int64_t together = from.column_stride == 1 ? columns : 1;
      __builtin_memset(row, 0, static_cast<std::size_t>(stride) * sizeof(E));
      for (int64_t c = 0; c < columns; c += together) {
        __builtin_memcpy(row + 2 * c, source + c * from.column_stride, static_cast<std::size_t>(2 * together));
      }
    }
  }
}

#if defined(__AVX512BF16__)
// To nearest, ties to even; subnormals to 0.
inline __m256i rounded(Vec<float> x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

// Two rows of numbers, one in each half, as pairs. The masked form, because gcc 12 warns inside the plain one.
inline Vec<BFloat16Pair> in_turn(__m512i rows) {
  alignas(64) static constexpr int16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec<BFloat16Pair>)_mm512_maskz_permutexvar_epi16(~0u, _mm512_load_si512(kOrder), rows);
}
inline Vec<BFloat16Pair> paired(Vec<float> first, Vec<float> second) {
  return in_turn((__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
// Numbers [column, column + kLanes) of two rows, the second maybe absent (null, then 0).
inline Vec<BFloat16Pair> paired(const BFloat16Pair* first, const BFloat16Pair* second, int64_t column) {
  const auto numbers = [column](const BFloat16Pair* row) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(reinterpret_cast<const BFloat16*>(row) + column));
  };
  const __m256i below = second == nullptr ? _mm256_setzero_si256() : numbers(second);
  return in_turn(_mm512_mask_broadcast_i64x4(_mm512_castsi256_si512(numbers(first)), 0xf0, below));
}
// The numbers, first or second of their pairs, whose lane is true; else 0.
inline Vec<BFloat16Pair> chosen(Vec<BFloat16Pair> pairs, Vec<int32_t> first, Vec<int32_t> second) {
  return pairs & ((first & 0xffff) | (second << 16));
}
#endif

// Rows [count][columns] for a sum over the rows: as they are, or each row joined with the next, in `to`, which holds steps_size elements.
template <class E>
inline int64_t steps_size(int64_t count, int64_t columns) {
  return kStepsPerElement<E> == 1 ? 0 : round_up(packed<E>(count), kStepUnit<E>) * round_up(columns, kLanes<E>);
}
template <class E>
inline Vectors<E> by_step(RowMajor<E> rows, int64_t count, int64_t columns, E* to) {
  if constexpr (kStepsPerElement<E> == 1) {
    return {rows.data, rows.stride};
  } else {
    const int64_t stride = round_up(columns, kLanes<E>);
    for (int64_t r = 0; r < count; r += 2) {
      const E *first = rows.data + r * rows.stride, *second = r + 1 < count ? first + rows.stride : nullptr;
      for (int64_t c = 0; c < stride; c += kLanes<E>) store(to + r / 2 * stride + c, paired(first, second, c));
    }
    fill<E>(to + packed<E>(count) * stride, steps_size<E>(count, columns) - packed<E>(count) * stride, E(0));
    return {to, stride};
  }
}

// The weights of a sum over the keys, given as elements [step][lane]: as they lie, or where products read tiles of them, turned in `to`.
template <class E>
inline auto weights_by_key(E* steps, int64_t count, int64_t lanes, [[maybe_unused]] E* to) {
  if constexpr (kStepUnit<E> == 1) {
    return ColumnMajor<E>{steps, lanes};
  } else {
    const int64_t whole = round_up(count, kStepUnit<E>);
    fill<E>(steps + count * lanes, (whole - count) * lanes, E(0));
    transpose_block<E>(steps, lanes, whole, lanes, to, whole);
    return RowMajor<E>{to, whole};
  }
}

// The dtype of tensors of elements E as they are.
template <class E>
constexpr DType kStored = std::is_same_v<E, BFloat16Pair> ? DType::kBFloat16
                          : std::is_same_v<E, double>     ? DType::kFloat64
                                                          : DType::kFloat32;

// Whether rows of `size` sums can be stored past the caches in tensors of `dtype`: whole vectors of E as they are, of other 16-bit numbers
// two. The parts of a cache line are to come one after the other: the sums of a row are made together, or are whole lines. (Of 16 bytes
// there is no such store, and no part of a line is slow.)
template <class E>
inline bool can_stream(DType dtype, int64_t size) {
  constexpr int64_t kSums = kLanes<SumOf<E>>;
  if (kVectorBytes > 16 && size > kPanel * kSums && size * bytes_of(dtype) % 64 != 0) return false;
  if (dtype == kStored<E>) return size % kSums == 0;
  return bytes_of(dtype) == 2 && kStreamsTwo<E, Half> && size % (2 * kSums) == 0;
}
// Vectors of sums so stored in a row, from number `at` on.
template <class E, int N>
inline void stream_row(DType dtype, void* numbers, int64_t at, [[maybe_unused]] int64_t stride, const Sum<E> (&x)[N]) {
  if constexpr (kStepsPerElement<E> == 1) {
    with_storage(dtype, [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      auto* to = static_cast<Storage*>(numbers) + at;
      if constexpr (std::is_same_v<Storage, E>) {
        for (int i = 0; i < N; ++i) stream(to + i * kLanes<E>, x[i]);
      } else if constexpr (kStreamsTwo<E, Storage>) {
        for (int i = 0; i + 1 < N; i += 2) stream_narrowed(to + i * kLanes<E>, x[i], x[i + 1]);
      }
    });
  } else {
#if defined(__AVX512BF16__)
    BFloat16* to = static_cast<BFloat16*>(numbers) + at;
    int i = 0;
    if (stride % 32 == 0) {  // then two vectors fill a cache line
      for (; i + 1 < N; i += 2, to += 32) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)_mm512_cvtne2ps_pbh((__m512)x[i + 1], (__m512)x[i]));
      }
    }
    for (; i < N; ++i, to += 16) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), rounded(x[i]));
#endif
  }
}

// A tile of P or dS, [key][row(lanes)].
template <class E>
class WeightTile {
 public:
  explicit WeightTile(E* memory) : tile_(memory) {}

  // Numbers from key to key: whole steps of a sum over the lanes.
  static int64_t row(int64_t lanes) { return round_up(lanes, kStepsPerElement<E> * kStepUnit<E>); }

  E* get() const { return tile_; }
  void put(int64_t at, Sum<E> x) const {
#if defined(__AVX512BF16__)
    if constexpr (kStepsPerElement<E> > 1) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<BFloat16*>(tile_) + at), rounded(x));
      return;
    }
#endif
    if constexpr (kStepsPerElement<E> == 1) store(tile_ + at, x);
  }
  RowMajor<E> by_lane(int64_t lanes) const { return {tile_, packed<E>(row(lanes))}; }  // for a sum over the lanes
  // For a sum over the keys. steps: memory of a tile's size for pairs of keys; turned: the same for what products read in tiles, this
  // tile's own too, which is read before.
  auto by_key(int64_t keys, int64_t lanes, E* steps, E* turned) const {
    const Vectors<E> by_pair = by_step(by_lane(lanes), keys, lanes, steps);
    return weights_by_key(const_cast<E*>(by_pair.data), packed<E>(keys), lanes, turned);
  }
  // What lies beyond the lanes of the first keys is 0.
  void clear_rest(int64_t keys, int64_t lanes) const {
    for (int64_t j = 0; row(lanes) > lanes && j < keys; ++j) {
      for (int64_t lane = lanes; lane < row(lanes); lane += kLanes<SumOf<E>>) put(j * row(lanes) + lane, Sum<E>{});
    }
  }

 private:
  E* tile_;
};

}  // namespace smattn::cpu::SMATTN_UNIT
