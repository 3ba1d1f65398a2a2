// First step of every backward: what the passes read of a query row, side by side in one buffer. A warp a row.
// attention: delta of reference.py (5). attention_map: w_h * eta of (10), so that with w_h * dA for dP the passes are the same.
#pragma once

#include "scores.h"

namespace smattn::cuda {

constexpr int kRowsThreads = 128;

// <dO, O>
SMATTN_DEVICE float output_gradient_product(const RowsArgs& args, Head at, int64_t i) {
  const auto row = [&](const Tensor4& x) { return at.b * x.stride[0] + at.h * x.stride[1] + i * x.stride[2]; };
  const int64_t dout = row(args.dout), out = row(args.out), remainder = row(args.remainder);
  float sum = 0.0f;
  for (int64_t col = lane_index(); col < args.call.scores.size.Dv; col += kWarp) {
    float o = load_element(args.out, out + col * args.out.stride[3]);
    if (args.remainder.data != nullptr) o += load_element(args.remainder, remainder + col * args.remainder.stride[3]) / kRemainderScale;
    sum = fmaf(load_element(args.dout, dout + col * args.dout.stride[3]), o, sum);
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  return sum;
}

SMATTN_DEVICE void backward_rows_block(const RowsArgs& args) {
  const Sizes& size = args.call.scores.size;
  const int64_t row = block_index() * (kRowsThreads / kWarp) + warp_index();
  if (row >= size.B * size.H * size.Nq) return;
  const int64_t i = row % size.Nq;
  const Head at{static_cast<int>(row / size.Nq / size.H), static_cast<int>(row / size.Nq % size.H)};
  const float lse = args.lse[row];
  RowState state{lse * kLog2E, 0.0f, args.mbar == nullptr ? 0.0f : args.mbar[row], args.dlse == nullptr ? 0.0f : args.dlse[row]};
  if (args.sums != nullptr) {
    state.delta = (args.head_weights == nullptr ? 1.0f : args.head_weights[at.h]) * args.sums[row] - state.dl;
  } else if (args.out.data != nullptr) {
    state.delta = output_gradient_product(args, at, i) - state.dl;
  }
  // In a dead row P and dS are exactly 0. What comes of a row with a score of +inf is NaN.
  if (lse == -infinity()) state = {infinity(), 0.0f, 0.0f, 0.0f};
  if (lse == infinity()) state.lse_log2 = not_a_number();
  if (lane_index() == 0) args.rows[row] = state;
}

}  // namespace smattn::cuda
