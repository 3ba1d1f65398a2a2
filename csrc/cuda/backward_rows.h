// First step of every backward: what the passes read of a query row, side by side in one buffer. A warp a row.
// attention: delta of reference.py (5). attention_map: w_h * eta of (10), so that with w_h * dA for dP the passes are the same.
#pragma once

#include "scores.h"

namespace smattn::cuda {

constexpr int kRowsThreads = 128;

template <class T, class OutT>
SMATTN_DEVICE float output_gradient_product(const RowsArgs& args, Head at, int64_t i, bool& any) {
  const auto row = [&](const Tensor4& x) { return at.b * x.stride[0] + at.h * x.stride[1] + i * x.stride[2]; };
  const auto* dout = static_cast<const T*>(args.dout.data) + row(args.dout);
  const auto* out = static_cast<const OutT*>(args.out.data) + row(args.out);
  float sum = 0.0f, square = 0.0f;
  for (int64_t col = lane_index(); col < args.call.scores.size.Dv; col += kWarp) {
    const float o = to_float(out[col * args.out.stride[3]]);
    sum = fmaf(to_float(dout[col * args.dout.stride[3]]), o, sum);
    square = fmaf(o, o, square);
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    sum += shuffle_xor(sum, lanes);
    square += shuffle_xor(square, lanes);
  }
  any |= square != 0.0f;
  return sum;
}

template <class T>
SMATTN_DEVICE void backward_rows_block(const RowsArgs& args) {
  const Sizes& size = args.call.scores.size;
  const int64_t row = block_index() * (kRowsThreads / kWarp) + warp_index();
  if (row >= size.B * size.H * size.Nq) return;
  const int64_t i = row % size.Nq;
  const Head at{static_cast<int>(row / size.Nq / size.H), static_cast<int>(row / size.Nq % size.H)};
  RowState state{args.lse[row] * kLog2E, 0.0f, args.mbar == nullptr ? 0.0f : args.mbar[row], args.dlse == nullptr ? 0.0f : args.dlse[row]};
  bool any = state.mbar != 0.0f;  // something was summed in this row, or NaN
  if (args.eta != nullptr) {
    state.delta = args.head_weights[at.h] * args.eta[row];
    any |= args.eta[row] != 0.0f;
  } else if (args.out.data != nullptr) {
    state.delta = (args.out.dtype == DType::kFloat32 ? output_gradient_product<T, float>(args, at, i, any)
                                                     : output_gradient_product<T, T>(args, at, i, any)) - state.dl;
  }
  // a row whose live scores are all -inf has lse = -inf too, but NaN for output: what comes of it is NaN, not 0
  if (args.lse[row] == -infinity() && !any) state = {infinity(), 0.0f, 0.0f, 0.0f};
  if (lane_index() == 0) args.rows[row] = state;
}

}  // namespace smattn::cuda
