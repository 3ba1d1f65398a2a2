#include "cpu/dropout_bits.h"

#include "philox.h"

namespace smattn {

void dropout_bits(const DropoutBits& bits, ParallelFor threads) {
  const uint32_t threshold = dropout_threshold(bits.p);
  const int64_t grain = 1 + 4096 / (bits.Nk + 1);  // rows worth a thread's start
  parallel_for(threads, bits.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto bh = static_cast<uint32_t>(row / bits.Nq);
      const auto i = static_cast<uint32_t>(row % bits.Nq);
      bool* keep = bits.keep + row * bits.Nk;  // [Nk]
      for (int64_t j = 0; j < bits.Nk; ++j) {
        keep[j] = dropout_keeps(bits.seed, bh, i, static_cast<uint32_t>(j), threshold);
      }
    }
  });
}

}  // namespace smattn
