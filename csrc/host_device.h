// How a function is marked that CUDA kernels and several units of the CPU kernels call.
#pragma once

#ifdef __CUDACC__
#define SMATTN_HOST_DEVICE __host__ __device__
#else
// Units of several instruction sets include it, and the linker must not take one unit's code for another's: it finds nothing to merge.
#define SMATTN_HOST_DEVICE __attribute__((always_inline)) inline
#endif
