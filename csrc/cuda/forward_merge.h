// Rows that several blocks of forward.h have summed over ranges of keys, put together: a warp a row, in the order of the ranges.
#pragma once

#include "forward.h"

namespace smattn::cuda {

constexpr int kMergeThreads = 128;

template <class T>
SMATTN_DEVICE void forward_merge_block(const ForwardArgs& args) {
  const Sizes& size = args.call.scores.size;
  const int64_t rows = size.B * size.H * size.Nq, row = block_index() * (kMergeThreads / kWarp) + warp_index();
  if (row >= rows) return;
  float m = -infinity(), l = 0.0f, lost = 0.0f, average[2] = {0.0f, 0.0f};
  for (int64_t i = 0; i < args.splits; ++i) m = fmaxf(m, args.partial_rows[i * rows + row].m);
  // 1 also where the largest score is infinite: +inf, and so is what is summed, or -inf, and that is 0
  const auto factor_of = [&](float part) { return part == m ? 1.0f : exp2_fast(part - finite(m)); };
  for (int64_t i = 0; i < args.splits; ++i) {
    const PartialRow part = args.partial_rows[i * rows + row];
    const float factor = factor_of(part.m);
    const float before = l, added = fmaf(part.l, factor, 0.0f);  // rounded by itself
    l = before + added;
    lost += lost_by(l, before, added);
    for (int which = 0; which < 2; ++which) average[which] += rescaled(factor, part.average[which]);
  }
  float lse;
  const float factor = finish_row(m, with_lost(l, lost), lse);
  if (lane_index() == 0) store_row<T>(args, row, m, lse, factor, average);
  if (args.out == nullptr) return;
  for (int64_t col = lane_index(); col < size.Dv; col += kWarp) {
    float sum = 0.0f;
    for (int64_t i = 0; i < args.splits; ++i)
      sum = fmaf(args.partial_out[(i * rows + row) * size.Dv + col], factor_of(args.partial_rows[i * rows + row].m), sum);
    sum *= factor * args.call.keep_scale;
    const int64_t at = row * size.Dv + col;
    const T out = rounded<T>(sum);
    static_cast<T*>(args.out)[at] = out;
    if constexpr (sizeof(T) == 2) {
      if (args.remainder != nullptr) static_cast<RemainderOf<T>*>(args.remainder)[at] = remainder_of(sum, out);
    }
  }
}

}  // namespace smattn::cuda
