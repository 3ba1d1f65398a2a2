// The CPU kernels, one set for each instruction set; which set runs is chosen at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "parallel.h"
#include "params.h"

namespace smattn::cpu {

struct Kernels {
  const char* name;  // "amx", "avx512bf16", "avx512", "avx2" or "baseline"
  void (*forward)(const ForwardParams& params, ParallelFor threads);
  void (*backward)(const BackwardParams& params, ParallelFor threads);
  void (*attention_map)(const MapParams& params, ParallelFor threads);
  void (*attention_map_backward)(const MapBackwardParams& params, ParallelFor threads);
  void (*exp2_float)(const float* x, float* y, int64_t n);  // the kernels' own 2^x, to be tested
  void (*exp2_double)(const double* x, double* y, int64_t n);
};

const std::vector<const Kernels*>& available();  // those that this machine can run, the fastest first
const std::string& why_first();                // the first one's name, and why it is the first
const Kernels& selected();                     // the first of them, unless select() chose another
bool select(const char* name);                 // for tests and measurements, whole process; false where no such set is available

// For tests: sum[m][n] += the sum over k of a[m][k] * b[k / 2][n][k % 2] for 16 x 16 floats and 32 bfloat16, by a matrix tile or by its
// double in software. False where this machine cannot.
bool multiply_tile(bool in_software, const uint16_t* a, const uint16_t* b, float* sum);

}  // namespace smattn::cpu
