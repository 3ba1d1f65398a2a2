// What the kernels ask of the machine: indices, barriers, shuffles, tensor cores, asynchronous copies. Here for the device, as PTX;
// emulator.h has the same functions for a host, where they also check how they are called.
#pragma once

#include "numbers.h"

#ifndef __CUDACC__
#include "emulator/emulator.h"
#else

namespace smattn::cuda {

constexpr int kWarp = 32;

SMATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SMATTN_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
SMATTN_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
SMATTN_DEVICE int64_t block_index() { return blockIdx.x; }

SMATTN_DEVICE void sync_warp() { __syncwarp(); }
SMATTN_DEVICE void sync_block() { __syncthreads(); }
SMATTN_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
SMATTN_DEVICE float shuffle(float x, int from) { return __shfl_sync(0xFFFFFFFFu, x, from); }

// What nobody writes while the kernel runs.
SMATTN_DEVICE float load_constant(const float* p) { return __ldg(p); }
SMATTN_DEVICE double load_constant(const double* p) { return __ldg(p); }
SMATTN_DEVICE Half load_constant(const Half* p) { return {__ldg(reinterpret_cast<const unsigned short*>(p))}; }
SMATTN_DEVICE BFloat16 load_constant(const BFloat16* p) { return {__ldg(reinterpret_cast<const unsigned short*>(p))}; }

// Identity that the optimiser cannot see through: it stops address arithmetic from being hoisted out of a loop into registers.
template <class T>
SMATTN_DEVICE T* opaque(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}
SMATTN_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

SMATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SMATTN_DEVICE float log2_exact(float x) { return log2f(x); }
SMATTN_DEVICE float infinity() { return __int_as_float(0x7F800000); }
SMATTN_DEVICE float not_a_number() { return __int_as_float(0x7FC00000); }

SMATTN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements; lane l hands in row l % 8 of matrix l / 8, and holds of matrix i row lane / 4, columns
// 2 * (lane % 4) and the next.
SMATTN_DEVICE void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same four matrices, each transposed.
SMATTN_DEVICE void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], 16-bit operands.
SMATTN_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SMATTN_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [16, 8] += a [16, 8] b [8, 8], operands rounded to TF32.
SMATTN_DEVICE void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SMATTN_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// SIZE bytes, 8 or 16, from global to shared memory, of which the first `bytes` are read and the rest become 0; both are aligned to SIZE.
template <int SIZE = 16>
SMATTN_DEVICE void copy_async(void* to, const void* from, int bytes) {
  if constexpr (SIZE == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(SIZE), "r"(bytes) : "memory");
  }
}
SMATTN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `PENDING` of this thread's committed groups are under way.
template <int PENDING>
SMATTN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace smattn::cuda

#endif
