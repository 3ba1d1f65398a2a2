// First step of every backward: what the passes read of a query row, side by side in one buffer. A warp a row.
// attention: delta of reference.py (5). attention_map: w_h * eta of (10), so that with w_h * dA for dP the passes are the same.
#pragma once

#include "scores.h"

namespace smattn::cuda {

constexpr int kRowsThreads = 128;
constexpr float kLseRounding = 0x1p-21f;  // of an lse: four units in the last place, more than it and an S of its size are off together

// An element of the output as it was before it was rounded.
template <class T>
SMATTN_DEVICE float unrounded_element(const RowsArgs& args, int64_t at) {
  return unrounded(static_cast<const T*>(args.out)[at], static_cast<const RemainderOf<T>*>(args.remainder)[at]);
}
SMATTN_DEVICE float output_element(const RowsArgs& args, int64_t at) {
  switch (args.call.scores.dtype) {
    case DType::kFloat16: return unrounded_element<Half>(args, at);
    case DType::kBFloat16: return unrounded_element<BFloat16>(args, at);
    default: return static_cast<const float*>(args.out)[at];
  }
}

// <dO, O> of query i of a head, which is row `row` of O.
SMATTN_DEVICE float output_gradient_product(const RowsArgs& args, Head at, int64_t i, int64_t row) {
  const Tensor4& x = args.dout;
  const int64_t dout = at.b * x.stride[0] + at.h * x.stride[1] + i * x.stride[2], depth = args.call.scores.size.Dv;
  float sum = 0.0f;
  for (int64_t col = lane_index(); col < depth; col += kWarp)
    sum = fmaf(load_element(x, dout + col * x.stride[3]), output_element(args, row * depth + col), sum);
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  return sum;
}

// What is subtracted from a row's scores in base 2, in a dead row +inf. What comes of a row with a score of +inf is NaN.
SMATTN_DEVICE float shift_of(float lse) {
  if (lse == -infinity()) return infinity();
  if (lse == infinity()) return not_a_number();
  // Where lse is so large that rounding it and the scores could make P more than 2, even infinite, it is raised by what is beyond that.
  return (lse + fmaxf(fabsf(lse) * kLseRounding - 1.0f, 0.0f)) * kLog2E;
}

SMATTN_DEVICE void backward_rows_block(const RowsArgs& args) {
  const Sizes& size = args.call.scores.size;
  const int64_t row = block_index() * (kRowsThreads / kWarp) + warp_index();
  if (row >= size.B * size.H * size.Nq) return;
  const int64_t i = row % size.Nq;
  const Head at{static_cast<int>(row / size.Nq / size.H), static_cast<int>(row / size.Nq % size.H)};
  const bool is_dead = args.normalizer != nullptr ? args.normalizer[2 * row + 1] == 0.0f : args.lse[row] == -infinity();
  float delta = args.dlse == nullptr ? 0.0f : -args.dlse[row];
  if (args.sums != nullptr) {
    delta += (args.head_weights == nullptr ? 1.0f : args.head_weights[at.h]) * args.sums[row];
  } else if (args.out != nullptr) {
    delta += output_gradient_product(args, at, i, row);
  }
  if (is_dead) delta = 0.0f;  // in a dead row P and dS are exactly 0
  if (lane_index() > 0) return;
  if (!args.normalized) {
    static_cast<LseState*>(args.rows)[row] = {shift_of(args.lse[row]), delta};
  } else if (args.normalizer != nullptr) {
    static_cast<NormalizerState*>(args.rows)[row] = {args.normalizer[2 * row], delta, args.normalizer[2 * row + 1]};
  } else {  // P is then 2^(S - L), and NaN where L is, of which a minimum takes no notice
    const float shift = shift_of(args.lse[row]);
    static_cast<NormalizerState*>(args.rows)[row] = {shift, delta, shift == shift ? 1.0f : shift};
  }
}

}  // namespace smattn::cuda
