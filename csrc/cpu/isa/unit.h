// Included last by the unit of one instruction set: its kernels under its name.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/map.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class T>
void exp2_run(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    T lanes[kLanes<T>] = {};
    const int64_t count = smaller_of<int64_t>(kLanes<T>, n - i);
    for (int64_t j = 0; j < count; ++j) lanes[j] = x[i + j];
    store(lanes, exp2<T>(load(lanes)));
    for (int64_t j = 0; j < count; ++j) y[i + j] = lanes[j];
  }
}

void forward(const ForwardParams& p, ParallelFor threads) {
  p.scores.dtype == DType::kFloat64 ? forward_of<double>(p, threads) : forward_of<float>(p, threads);
}
void backward(const BackwardParams& p, ParallelFor threads) {
  p.scores.dtype == DType::kFloat64 ? backward_of<double>(p, threads) : backward_of<float>(p, threads);
}
void attention_map(const MapParams& p, ParallelFor threads) {
  p.scores.dtype == DType::kFloat64 ? attention_map_of<double>(p, threads) : attention_map_of<float>(p, threads);
}
void attention_map_backward(const MapBackwardParams& p, ParallelFor threads) {
  p.scores.dtype == DType::kFloat64 ? attention_map_backward_of<double>(p, threads) : attention_map_backward_of<float>(p, threads);
}

void exp2_float(const float* x, float* y, int64_t n) { exp2_run(x, y, n); }
void exp2_double(const double* x, double* y, int64_t n) { exp2_run(x, y, n); }

extern const Kernels kKernels;
const Kernels kKernels = {SMATTN_UNIT_NAME, forward, backward, attention_map, attention_map_backward, exp2_float, exp2_double};

}  // namespace smattn::cpu::SMATTN_UNIT
