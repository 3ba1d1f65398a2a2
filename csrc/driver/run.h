// One problem through the kernels, and what came out beside the oracle's answers.
#pragma once

#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "inputs.h"
#include "oracle.h"
#include "parallel.h"
#include "problem.h"

namespace smattn::driver {

// What an error may be before the last rounding: shares of A(T) and of sqrt(Q(T)).
struct Allowance {
  double magnitude = 0.0, squares = 0.0;
};

struct Output {
  std::string name;
  Array array;  // absent when it was not asked for
  const Expected* expected;
  Allowance allowance;
};

// Forward, backward from forward's own results, attention map and its backward; every output filled with NaN first.
std::vector<Output> run_kernels(const cpu::Kernels& kernels, const Problem& problem, const Inputs& inputs, const Answers& answers,
                                ParallelFor threads);

// How many of kThreads threads a pass uses: no more than it has items, or than memory has room for.
struct Workers {
  static constexpr int64_t kThreads = 32;
  int64_t forward, backward;
};
Workers workers_of(const cpu::Kernels& kernels, const Problem& problem);

// The largest error as a share of what is allowed, 1 is the limit; infinite where the answer is infinite or NaN and the output is not it.
struct Comparison {
  double share = 0.0;
  std::string where;  // of the largest share
};

Comparison compare(const Output& output);

}  // namespace smattn::driver
