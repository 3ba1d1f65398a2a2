// The entry points that the driver tries, named here and in kernels.cpp alone.
#pragma once

#include <vector>

#include "parallel.h"
#include "params.h"

namespace smattn::driver {

struct Level {
  const char* name;
  int number;
};

std::vector<Level> levels();     // the instruction sets that this machine has
void force(const Level& level);  // whose kernels run from here on

void forward(const ForwardParams& params, ParallelFor threads);
void backward(const BackwardParams& params, ParallelFor threads);
void attention_map(const MapParams& params, ParallelFor threads);
void attention_map_backward(const MapBackwardParams& params, ParallelFor threads);

}  // namespace smattn::driver
