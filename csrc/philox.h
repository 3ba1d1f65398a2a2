// The dropout bits, the same on every backend: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace smattn {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;  // the keys' Weyl sequences

struct PhiloxBlock {
  uint32_t word[4];
};

SMATTN_HOST_DEVICE constexpr PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * counter.word[0];
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// Words below this one are dropped: floor(p * 2^32), 0 <= p < 1.
SMATTN_HOST_DEVICE constexpr uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

// Whether element (b, h, i, j) of the probabilities is kept; bh = b * H + h.
SMATTN_HOST_DEVICE constexpr bool dropout_keeps(uint64_t seed, uint32_t bh, uint32_t i, uint32_t j, uint32_t threshold) {
  return philox4x32_10({{j, i, bh, 0}}, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)).word[0] >= threshold;
}

}  // namespace smattn
