// delta (5) of every query row, which backward subtracts from dP.
#pragma once

#include "cpu/forward.h"
#include "cpu/tiles/rows.h"

namespace smattn::cpu::SMATTN_UNIT {

// (5), from the output, or as the mean of dP under P in a pass of its own.
template <class E, class T>
inline void compute_delta(const BackwardParams& p, ParallelFor threads, T* delta) {
  const Sizes& n = p.scores.size;
  if (p.out == nullptr) {
    ForwardTask<T> means{.params = {}, .dmap = {}, .dout = p.dout, .eta = delta};
    means.params.scores = p.scores, means.params.value = p.value, means.params.dropout = p.dropout;
    forward_pass<E>(means, threads);
  } else {
    constexpr int64_t kRows = 16;  // at a time
    const int64_t blocks = blocks_of(n.Nq, kRows);
    parallel_for(threads, n.B * n.H * blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t stride = round_up(n.Dv, kLanes<T>);
      const Buffer<T> dout(kRows * stride), out(kRows * stride);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t bh = item / blocks, first = item % blocks * kRows, rows = smaller_of(kRows, n.Nq - first);
        read_rows<T>(rows_of(p.dout, bh / n.H, bh % n.H, first), rows, n.Dv, dout, stride);
        const int64_t offset = (bh * n.Nq + first) * n.Dv;
        if (p.remainder == nullptr) {
          read_rows<T>({p.out, p.scores.dtype, offset, n.Dv, 1}, rows, n.Dv, out, stride);
        } else {
          read_unrounded<T>(p.out, p.remainder, p.scores.dtype, offset, rows, n.Dv, out, stride);
        }
        for (int64_t i = 0; i < rows; ++i) {
          Vec<T> sum{};
          for (int64_t at = i * stride; at < (i + 1) * stride; at += kLanes<T>) sum = fused(load(dout + at), load(out + at), sum);
          delta[bh * n.Nq + first + i] = sum_lanes<T>(sum);
        }
      }
    });
  }
  const auto* dlse = static_cast<const T*>(p.dlse);
  const auto is_dead = dead_rows<T>(p.lse, p.normalizer);
  for (int64_t row = 0; row < n.B * n.H * n.Nq; ++row) {
    const T own = dlse != nullptr ? delta[row] - dlse[row] : delta[row];
    delta[row] = is_dead(row) ? T(0) : own;  // a dead row's dL may be NaN
  }
}

}  // namespace smattn::cpu::SMATTN_UNIT
