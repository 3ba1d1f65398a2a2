// One problem through the kernels, and what came out beside the oracle's answers.
#pragma once

#include <string>
#include <vector>

#include "cpu/attention.h"
#include "inputs.h"
#include "oracle.h"
#include "parallel.h"
#include "problem.h"

namespace smattn::driver {

struct Output {
  std::string name;
  Array array;  // absent when it was not asked for
  const Expected* expected;
  double weights;  // the share of sqrt(Q) that an error may be, besides band * A
};

// Forward, backward from forward's own results, attention map and its backward; every output filled with NaN first.
std::vector<Output> run_kernels(const cpu::Kernels& kernels, const Problem& problem, const Inputs& inputs, const Answers& answers,
                                ParallelFor threads);

// The largest error as a share of what is allowed (band * A(T), the weights' share of sqrt(Q(T)), the last rounding); 1 is the limit.
// Infinite where the answer is infinite or NaN and the output is not it.
struct Comparison {
  double share = 0.0;
  std::string where;  // of the largest share
};

Comparison compare(const Output& output, double band);

}  // namespace smattn::driver
