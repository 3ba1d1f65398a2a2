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
  float m = -infinity(), l = 0.0f, average[2] = {0.0f, 0.0f}, most = 0.0f;
  for (int64_t i = 0; i < args.splits; ++i) m = fmaxf(m, args.partial_rows[i * rows + row].m);
  const float top = m == -infinity() ? 0.0f : m;
  for (int64_t i = 0; i < args.splits; ++i) {
    const PartialRow part = args.partial_rows[i * rows + row];
    const float factor = exp2_fast(part.m - top);
    l += part.l * factor;
    most = fmaxf(most, part.l);
    for (int which = 0; which < 2; ++which) average[which] += part.average[which] * factor;
  }
  float lse;
  const float factor = finish_row(m, m == -infinity() ? most : l, lse);
  if (lane_index() == 0) store_row(args, row, lse, factor, average);
  if (args.out == nullptr) return;
  for (int64_t col = lane_index(); col < size.Dv; col += kWarp) {
    float sum = 0.0f;
    for (int64_t i = 0; i < args.splits; ++i)
      sum = fmaf(args.partial_out[(i * rows + row) * size.Dv + col], exp2_fast(args.partial_rows[i * rows + row].m - top), sum);
    sum *= factor * args.call.keep_scale;
    round_to(static_cast<T*>(args.out)[row * size.Dv + col], sum);
    if (args.out_acc != nullptr) args.out_acc[row * size.Dv + col] = sum;
  }
}

}  // namespace smattn::cuda
