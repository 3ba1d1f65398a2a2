// delta (5) of every query row, which backward subtracts from dP.
#pragma once

#include "cpu/forward.h"

namespace smattn::cpu::SMATTN_UNIT {

// (5), from the output, or as the mean of dP under P in a pass of its own.
template <class E, class T>
inline void compute_delta(const BackwardParams& p, ParallelFor threads, T* delta) {
  const Sizes& n = p.scores.size;
  if (p.out.data == nullptr) {
    ForwardTask<T> means{.params = {}, .dmap = {}, .dout = p.dout, .eta = delta};
    means.params.scores = p.scores, means.params.value = p.value, means.params.dropout = p.dropout;
    forward_pass<E>(means, threads);
  } else {
    parallel_for(threads, n.B * n.H, 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> dout(n.Dv), out(n.Dv), remainder(n.Dv);
      if (p.remainder.data == nullptr) fill<T>(remainder, n.Dv, T(0));
      for (int64_t bh = begin; bh < end; ++bh) {
        for (int64_t i = 0; i < n.Nq; ++i) {
          read_rows<T>(rows_of(p.dout, bh / n.H, bh % n.H, i), 1, n.Dv, dout, n.Dv);
          read_rows<T>(rows_of(p.out, bh / n.H, bh % n.H, i), 1, n.Dv, out, n.Dv);
          if (p.remainder.data != nullptr) read_rows<T>(rows_of(p.remainder, bh / n.H, bh % n.H, i), 1, n.Dv, remainder, n.Dv);
          T sum = 0;
          for (int64_t d = 0; d < n.Dv; ++d) sum += dout[d] * (out[d] + remainder[d] * T(1 / kRemainderScale));
          delta[bh * n.Nq + i] = sum;
        }
      }
    });
  }
  const auto *lse = static_cast<const T*>(p.lse), *dlse = static_cast<const T*>(p.dlse);
  for (int64_t row = 0; row < n.B * n.H * n.Nq; ++row) {
    const T own = dlse != nullptr ? delta[row] - dlse[row] : delta[row];
    delta[row] = lse[row] == -std::numeric_limits<T>::infinity() ? T(0) : own;  // a dead row's dL may be NaN
  }
}

}  // namespace smattn::cpu::SMATTN_UNIT
