// Sums of partial results, each in an order that the shape decides.
#pragma once

#include "scores.h"

namespace smattn::cuda {

constexpr int kSumThreads = 128;

// Few terms, many sums: a thread a sum.
SMATTN_DEVICE void sum_many_block(const SumArgs& args) {
  const int64_t at = block_index() * kSumThreads + thread_index();
  if (at >= args.outer * args.middle * args.inner) return;
  const int64_t inner = at % args.inner, middle = at / args.inner % args.middle, outer = at / args.inner / args.middle;
  const float* from = args.from + outer * args.stride_outer + middle * args.stride_middle + inner;
  float sum = 0.0f;
  for (int64_t r = 0; r < args.first; ++r)
    for (int64_t s = 0; s < args.second; ++s) sum += from[r * args.stride_first + s * args.stride_second];
  const auto& stride = args.logits.stride;
  if (args.logits.data != nullptr)
    sum = through_sigmoid(sum, args.logits, args.logits_batch.offset_of(outer) + middle * stride[1] + inner * stride[3]);
  store_element(args.to, args.dtype, at, sum);
}

// Many terms, few sums: a warp a sum, inner is 1.
SMATTN_DEVICE void sum_few_block(const SumArgs& args) {
  const int64_t at = block_index() * (kSumThreads / kWarp) + warp_index();
  if (at >= args.outer * args.middle) return;
  const float* from = args.from + at / args.middle * args.stride_outer + at % args.middle * args.stride_middle;
  float sum = 0.0f;
  for (int64_t r = 0; r < args.first; ++r)
    for (int64_t s = lane_index(); s < args.second; s += kWarp) sum += from[r * args.stride_first + s * args.stride_second];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (lane_index() == 0) store_element(args.to, args.dtype, at, sum);
}

}  // namespace smattn::cuda
