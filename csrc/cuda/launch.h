// One way to run a kernel: on a device, or block by block in the emulator.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <typeinfo>

#include "device.h"
#include "plan.h"

namespace smattn::cuda {

inline int64_t blocks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

// Kernel: Args, kThreads, kName, and run(args, shared) for a block.
#ifdef __CUDACC__

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) entry(const __grid_constant__ typename Kernel::Args args) {
  extern __shared__ __align__(128) std::byte shared[];
  Kernel::run(args, shared);
}

// The device is set because this library has a CUDA runtime of its own, that does not know which one torch's has chosen.
template <class Kernel>
void launch(int64_t blocks, size_t shared_bytes, const typename Kernel::Args& args, const Context& context) {
  if (blocks == 0) return;
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("CUDA kernel ") + Kernel::kName + " (" + std::to_string(blocks) + " blocks of " +
                             std::to_string(Kernel::kThreads) + " threads, " + std::to_string(shared_bytes) +
                             " bytes of shared memory, device " + std::to_string(context.device) +
                             ") was not launched: " + cudaGetErrorString(error));
  };
  check(cudaSetDevice(context.device));
  if (blocks > 0x7FFFFFFF) check(cudaErrorInvalidConfiguration);
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  entry<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(context.stream)>>>(args);
  check(cudaGetLastError());
}

#else

template <class Kernel>
void launch(int64_t blocks, size_t shared_bytes, const typename Kernel::Args& args, const Context&) {
  if (emulator::interpreter != nullptr) {
    typename Kernel::Args clean = args;
    __builtin_clear_padding(&clean);  // what is left there could look like a pointer
    return emulator::interpreter(typeid(Kernel).name(), blocks, Kernel::kThreads, shared_bytes, &clean, sizeof clean);
  }
  emulator::run_grid(blocks, Kernel::kThreads, shared_bytes, [&](std::byte* shared) { Kernel::run(args, shared); });
}

#endif

}  // namespace smattn::cuda
