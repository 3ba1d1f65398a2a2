// The machine of device.h on a host: every thread of a block is a fiber, a warp's collective instruction runs when its 32 lanes have
// arrived, and warps run apart as far as the barriers let them. Wrong use aborts: lanes that diverge at a collective, misaligned copies,
// reads of shared memory past its end. Shared memory starts as NaN, asynchronous copies land as late as waiting allows (in every
// second block: at once), so that a missing wait or barrier shows in the results.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>

#include "../numbers.h"

namespace smattn::cuda {

constexpr int kWarp = 32;

namespace emulator {

// While false kernels are not run: what remains of a call is what it allocates, at any size.
inline bool runs = true;

// Who runs kernels in this emulator's place, if anybody: an interpreter of what nvcc makes of them. kernel: the mangled name of its type.
using Interpreter = void (*)(const char* kernel, int64_t blocks, int threads, size_t shared_bytes, const void* args, size_t args_bytes);
inline Interpreter interpreter = nullptr;

void run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void(std::byte* shared)>& kernel);

// What a lane brings to a collective; run(all) is called once with the 32 lanes' arguments.
void collective(const char* name, void* argument, void (*run)(void* const* all));

void check_shared(const void* p, size_t bytes, size_t alignment);

}  // namespace emulator

int thread_index();
int64_t block_index();
inline int lane_index() { return thread_index() % kWarp; }
inline int warp_index() { return thread_index() / kWarp; }

void sync_warp();
void sync_block();
float shuffle_xor(float x, int mask);
float shuffle(float x, int from);

template <class T>
T load_constant(const T* p) {
  return *p;
}

template <class T>
T opaque(T x) {
  return x;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_exact(float x) { return std::log2(x); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }

void load_matrices(uint32_t (&x)[4], const void* row);
void load_matrices_transposed(uint32_t (&x)[4], const void* row);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16);
void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t to_tf32(float x);

void copy_async_of(int size, void* to, const void* from, int bytes);
template <int SIZE = 16>
void copy_async(void* to, const void* from, int bytes) {
  copy_async_of(SIZE, to, from, bytes);
}
void copy_async_commit();
void copy_async_wait_until(int pending);
template <int PENDING>
void copy_async_wait() {
  copy_async_wait_until(PENDING);
}

}  // namespace smattn::cuda
