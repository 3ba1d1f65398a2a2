// What the kernels are given for one problem.
#pragma once

#include <vector>

#include "array.h"
#include "problem.h"

namespace smattn::driver {

struct Inputs {
  Array query, key, value;         // [B, H|Hkv, N, D]
  Array mask, alpha;               // [masks, H|1, Nq|1, Nk], [1, 1, 1, H]; absent without a mask
  Array dout, dlse;                // [B, H, Nq, Dv], [B, 1, H, Nq] acc
  Array head_weights, dmap;        // [1, 1, 1, H] acc, [B, 1, Nq, Nk] acc
  Guarded padding;                 // [B, Nk] bool, no data when there is none
  int64_t padding_stride[2] = {0, 0};
  std::vector<bool> padded;        // [B * Nk], all false when there is none
  std::vector<bool> dead;          // [B]
  uint64_t seed = 0;               // of dropout
};

// Padded keys hold NaN in key, value, mask and dmap; dead rows hold NaN in dout and dlse.
Inputs make_inputs(const Problem& problem);

}  // namespace smattn::driver
