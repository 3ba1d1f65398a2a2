// The dropout keep mask written out, so that a test can compare the bits of every backend.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace smattn {

struct DropoutBits {
  bool* keep;     // [rows, Nk], rows = B * H * Nq
  int64_t rows;
  int64_t Nq;
  int64_t Nk;
  uint64_t seed;
  double p;       // 0 <= p < 1
};

void dropout_bits(const DropoutBits& bits, ParallelFor threads);

}  // namespace smattn
