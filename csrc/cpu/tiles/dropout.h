// The dropout bits of philox.h for a tile of probabilities, a vector of queries at a time.
#pragma once

#include "cpu/tiles/tiles.h"
#include "params.h"
#include "philox.h"

namespace smattn::cpu::SMATTN_UNIT {

// A 32-bit word in the lower half of each lane; what lies above it does not matter.
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

// The products of words, 64 bits each.
inline Words multiply(Words x, uint32_t y) {
  const Words factor = y - Words{};
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)factor);  // maskz: gcc 12 warns inside the plain form
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)x, (__m256i)factor);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)x, (__m128i)factor);
#else
  return (x & 0xffffffffu) * factor;
#endif
}

// All ones or all zeros. (Signed, for what there is an instruction.)
inline Words at_least(Words x, uint32_t y) {
  typedef int64_t Signed __attribute__((vector_size(kVectorBytes)));
  return (Words)((Signed)(x & 0xffffffffu) >= static_cast<int64_t>(y));
}

// Word 0 of the blocks of one batch and head. Counters are (key, query, b * H + h, 0): query and key meet only in the third round, so that
// the first two are done for each alone.
class PhiloxTile {
 public:
  static constexpr int kAtOnce = 2;  // keys: so that not every product waits for the last; kKeys is a multiple of it

  PhiloxTile(uint64_t seed, uint32_t bh) : product_(uint64_t{kPhiloxMultiplier1} * bh) {
    for (uint32_t round = 0; round < 10; ++round) {
      key0_[round] = static_cast<uint32_t>(seed) + round * kPhiloxWeyl0;
      key1_[round] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxWeyl1;
    }
  }

  Words row(Words query) const { return multiply(query ^ (product_ >> 32) ^ key0_[0], kPhiloxMultiplier0); }

  // For what `row` made of the queries, and kAtOnce keys from `first` on.
  template <int kRows>
  void word0(const Words (&rows)[kRows], uint32_t first, Words (&x0)[kAtOnce][kRows]) const {
    Words x1[kAtOnce][kRows], x2[kAtOnce][kRows], x3[kAtOnce][kRows];
#pragma GCC unroll 4
    for (int c = 0; c < kAtOnce; ++c) {
      const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * (first + static_cast<uint32_t>(c));
      const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * (static_cast<uint32_t>(product0 >> 32) ^ key1_[0]);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        x0[c][r] = ((product1 >> 32) ^ product_ ^ key0_[1]) - Words{}, x1[c][r] = product1 - Words{};
        x2[c][r] = (rows[r] >> 32) ^ product0 ^ key1_[1], x3[c][r] = rows[r];
      }
    }
#pragma GCC unroll 8
    for (int round = 2; round < 10; ++round) {
#pragma GCC unroll 4
      for (int c = 0; c < kAtOnce; ++c) {
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          const Words product0 = multiply(x0[c][r], kPhiloxMultiplier0), product1 = multiply(x2[c][r], kPhiloxMultiplier1);
          x0[c][r] = (product1 >> 32) ^ x1[c][r] ^ key0_[round], x1[c][r] = product1;
          x2[c][r] = (product0 >> 32) ^ x3[c][r] ^ key1_[round], x3[c][r] = product0;
        }
      }
    }
  }

 private:
  uint64_t product_;
  uint64_t key0_[10], key1_[10];
};

// C/(1-p) of (3), [key][lane].
template <class T>
inline void dropout_tile(const Dropout& dropout, int64_t bh, const QueryBlock& q, const KeyBlock& k, T* tile) {
  constexpr int kParts = sizeof(uint64_t) / sizeof(T);  // a vector of words serves every second float
  typedef Bits<T> Whole __attribute__((vector_size(kVectorBytes)));
  const PhiloxTile philox(dropout.seed, static_cast<uint32_t>(bh));
  const uint32_t threshold = dropout_threshold(dropout.p);
  const Vec<T> kept = broadcast(static_cast<T>(1.0 / (1.0 - dropout.p)));
  for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
    Words row[kParts];
    for (int part = 0; part < kParts; ++part) {
      Words query{};
      for (int i = 0; i < kLanes<uint64_t>; ++i) query[i] = static_cast<uint64_t>(q.first + lane + i * kParts + part);
      row[part] = philox.row(query);
    }
    for (int64_t j = 0; j < k.count; j += PhiloxTile::kAtOnce) {
      Words word[PhiloxTile::kAtOnce][kParts];
      philox.word0(row, static_cast<uint32_t>(k.first + j), word);
      for (int c = 0; c < PhiloxTile::kAtOnce; ++c) {
        Words keep = at_least(word[c][0], threshold);
        if constexpr (kParts == 2) keep = (keep & 0xffffffffu) | (at_least(word[c][1], threshold) << 32);
        store(tile + (j + c) * q.lanes + lane, (Vec<T>)((Whole)keep & (Whole)kept));
      }
    }
  }
}

}  // namespace smattn::cpu::SMATTN_UNIT
