// Included last by a unit that multiplies pairs of bfloat16: bfloat16 attention is its own, all else is that of the unit "avx512".
#pragma once

#include "cpu/backward.h"
#include "cpu/dispatch.h"

namespace smattn::cpu::avx512 {
void forward(const ForwardParams& p, ParallelFor threads);
void backward(const BackwardParams& p, ParallelFor threads);
void attention_map(const MapParams& p, ParallelFor threads);
void attention_map_backward(const MapBackwardParams& p, ParallelFor threads);
void exp2_float(const float* x, float* y, int64_t n);
void exp2_double(const double* x, double* y, int64_t n);
}  // namespace smattn::cpu::avx512

namespace smattn::cpu::SMATTN_UNIT {

void forward(const ForwardParams& p, ParallelFor threads) {
  p.scores.dtype == DType::kBFloat16 ? forward_of<BFloat16Pair>(p, threads) : avx512::forward(p, threads);
}
void backward(const BackwardParams& p, ParallelFor threads) {
  p.scores.dtype == DType::kBFloat16 ? backward_of<BFloat16Pair>(p, threads) : avx512::backward(p, threads);
}

extern const Kernels kKernels;
const Kernels kKernels = {SMATTN_UNIT_NAME,   forward, backward, avx512::attention_map, avx512::attention_map_backward, avx512::exp2_float,
                          avx512::exp2_double};

}  // namespace smattn::cpu::SMATTN_UNIT
