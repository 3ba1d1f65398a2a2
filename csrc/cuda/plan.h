// The CUDA kernels, seen from outside: what a call needs, and which kernels it becomes. No torch, no CUDA header.
#pragma once

#include "../params.h"

namespace smattn::cuda {

constexpr int64_t kLargestHead = 256;

// Beside the params: where a call runs.
struct Context {
  int device;                      // the current one, whose stream it is
  void* stream;                    // cudaStream_t
  bool allow_tf32;
  const int64_t* seed;             // of dropout, in device memory: Dropout::seed is not read
  void* (*allocate)(int64_t bytes, void* allocator);  // device memory, 16-byte aligned, until the stream is past the call
  void* allocator;
};

// Sizes B, Nq and Nk are not 0. Throws std::runtime_error when a kernel cannot be launched.
void forward(const ForwardParams& params, const Context& context);
void backward(const BackwardParams& params, const Context& context);
void attention_map(const MapParams& params, const Context& context);
void attention_map_backward(const MapBackwardParams& params, const Context& context);

}  // namespace smattn::cuda
