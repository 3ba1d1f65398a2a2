#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

namespace smattn::cuda {
namespace emulator {
namespace {

constexpr size_t kStack = 256 * 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  int thread = 0;
  ucontext_t start;
  jmp_buf where;
  std::byte* stack = nullptr;
  bool begun = false, done = false;
  bool holding = false;
  std::vector<Copy> copies;                // not yet committed
  std::deque<std::vector<Copy>> committed;  // groups under way
};

struct Warp {
  const char* name = nullptr;  // of the collective that the lanes are arriving at
  void* argument[kWarp];
  int arrived = 0;
};

struct Block {
  Block(const std::function<void(std::byte*)>* kernel, std::byte* shared, size_t shared_bytes, int64_t index)
      : kernel(kernel), shared(shared), shared_bytes(shared_bytes), index(index) {}
  const std::function<void(std::byte*)>* kernel;
  std::byte* shared;
  size_t shared_bytes;
  int64_t index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int at_barrier = 0;
  bool barrier_or = false, barrier_result = false;
  jmp_buf scheduler;
  Fiber* running = nullptr;
};

thread_local Block* block = nullptr;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated block %lld, thread %d: %s\n", static_cast<long long>(block->index), block->running->thread, what);
  std::abort();
}

void yield_to_scheduler() {
  if (_setjmp(block->running->where) == 0) _longjmp(block->scheduler, 1);
}

// Gives way until another fiber calls release() on this one.
void hold() {
  block->running->holding = true;
  while (block->running->holding) yield_to_scheduler();
}

void fiber_main() {
  (*block->kernel)(block->shared);
  block->running->done = true;
  _longjmp(block->scheduler, 1);
}

void resume(Fiber& fiber) {
  block->running = &fiber;
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.where, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

// Runs one warp until all its lanes are done or wait at the block's barrier.
void run_warp(int warp) {
  for (bool progress = true; progress;) {
    progress = false;
    for (int lane = 0; lane < kWarp; ++lane) {
      Fiber& fiber = block->fibers[static_cast<size_t>(warp * kWarp + lane)];
      if (fiber.done || fiber.holding) continue;
      resume(fiber);
      progress = true;
    }
  }
}

void run_block() {
  const int warps = static_cast<int>(block->warps.size());
  for (int round = 0;; ++round) {
    for (int i = 0; i < warps; ++i) {  // another order of the warps in every block and between any two barriers
      const int warp = static_cast<int>((i + round + block->index) % warps);
      run_warp((block->index + round) % 2 == 0 ? warp : warps - 1 - warp);
    }
    int done = 0, holding = 0;
    for (const Fiber& fiber : block->fibers) {
      done += fiber.done;
      holding += fiber.holding && !fiber.done;
    }
    if (done == static_cast<int>(block->fibers.size())) return;
    if (holding + done == static_cast<int>(block->fibers.size())) fail("some threads wait for others that never come");
  }
}

}  // namespace

void run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void(std::byte*)>& kernel) {
  if (!runs) return;
  const size_t shared_space = shared_bytes + 128;
  const auto memory = std::make_unique<std::byte[]>(shared_space);
  const auto stacks = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(threads) * kStack);
  void* shared = memory.get();
  size_t space = shared_space;
  std::align(128, shared_bytes, shared, space);
  for (int64_t index = 0; index < blocks; ++index) {
    std::memset(shared, 0xFF, shared_bytes);
    Block current(&kernel, static_cast<std::byte*>(shared), shared_bytes, index);
    current.fibers = std::vector<Fiber>(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = current.fibers[static_cast<size_t>(i)];
      fiber.thread = i;
      fiber.stack = stacks.get() + static_cast<size_t>(i) * kStack;
    }
    current.warps.resize(static_cast<size_t>(threads / kWarp));
    block = &current;
    run_block();
    block = nullptr;
  }
}

void collective(const char* name, void* argument, void (*run)(void* const* all)) {
  const int first = warp_index() * kWarp;
  Warp& warp = block->warps[static_cast<size_t>(warp_index())];
  if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0) fail("the lanes of a warp diverge at a collective instruction");
  warp.name = name;
  warp.argument[lane_index()] = argument;
  if (++warp.arrived < kWarp) return hold();
  run(warp.argument);
  warp.arrived = 0;
  for (int lane = 0; lane < kWarp; ++lane) block->fibers[static_cast<size_t>(first + lane)].holding = false;
}

void check_shared(const void* p, size_t bytes, size_t alignment) {
  const auto* at = static_cast<const std::byte*>(p);
  if (at < block->shared || at + bytes > block->shared + block->shared_bytes) fail("outside shared memory");
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("misaligned in shared memory");
}

namespace {

struct Exchange {
  float value;
  int from;
};

float exchange(const char* name, float x, int from) {
  Exchange mine{x, from};
  collective(name, &mine, [](void* const* all) {
    float values[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) values[lane] = static_cast<Exchange*>(all[lane])->value;
    for (int lane = 0; lane < kWarp; ++lane) {
      auto* one = static_cast<Exchange*>(all[lane]);
      one->value = values[one->from];
    }
  });
  return mine.value;
}

struct Matrices {
  uint32_t* x;
  const void* row;
};

template <bool TRANSPOSED>
void load(void* const* all) {
  for (int i = 0; i < 4; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(matrix[row], static_cast<Matrices*>(all[8 * i + row])->row, sizeof matrix[row]);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint16_t low = TRANSPOSED ? matrix[t][g] : matrix[g][t], high = TRANSPOSED ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<Matrices*>(all[lane])->x[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// Operands to dense matrices, the product in float32, back to the lanes. element(register, half) -> float.
template <int K, class Element>
void multiply(void* const* all, const Element& element) {
  float a[16][K], b[K][8];
  constexpr int kHalves = K / 8;  // elements in a register: 2 of 16 bits, 1 of TF32
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* one = static_cast<const Product*>(all[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < kHalves; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][kHalves * (t + 4 * (i >> 1)) + e] = element(one->a[i], e);
      for (int i = 0; i < 2; ++i) b[kHalves * (t + 4 * i) + e][g] = element(one->b[i], e);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* one = static_cast<const Product*>(all[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
      float sum = one->c[i];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      one->c[i] = sum;
    }
  }
}

template <class T>
float half_of(uint32_t x, int half) {
  return to_float(T{static_cast<uint16_t>(half != 0 ? x >> 16 : x & 0xFFFF)});
}

void barrier() {
  Block& b = *block;
  if (++b.at_barrier < static_cast<int>(b.fibers.size())) return hold();
  b.at_barrier = 0;
  b.barrier_result = b.barrier_or;
  b.barrier_or = false;
  for (Fiber& fiber : b.fibers) fiber.holding = false;
}

void land(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
}

}  // namespace
}  // namespace emulator

using emulator::collective;

int thread_index() { return emulator::block->running->thread; }
int64_t block_index() { return emulator::block->index; }

void sync_warp() {
  collective("sync_warp", nullptr, [](void* const*) {});
}

void sync_block() { emulator::barrier(); }

bool any_in_block(bool x) {
  emulator::block->barrier_or |= x;
  emulator::barrier();
  return emulator::block->barrier_result;
}

float shuffle_xor(float x, int mask) { return emulator::exchange("shuffle_xor", x, lane_index() ^ mask); }
float shuffle(float x, int from) { return emulator::exchange("shuffle", x, from); }

void load_matrices(uint32_t (&x)[4], const void* row) {
  emulator::check_shared(row, 16, 16);
  emulator::Matrices mine{x, row};
  collective("load_matrices", &mine, emulator::load<false>);
}

void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  emulator::check_shared(row, 16, 16);
  emulator::Matrices mine{x, row};
  collective("load_matrices_transposed", &mine, emulator::load<true>);
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  emulator::Product mine{c, a, {b0, b1}};
  collective("multiply_add", &mine, [](void* const* all) { emulator::multiply<16>(all, emulator::half_of<Half>); });
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  emulator::Product mine{c, a, {b0, b1}};
  collective("multiply_add", &mine, [](void* const* all) { emulator::multiply<16>(all, emulator::half_of<BFloat16>); });
}

void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Product mine{c, a, {b0, b1}};
  collective("multiply_add_tf32", &mine, [](void* const* all) {
    emulator::multiply<8>(all, [](uint32_t x, int) {
      float y;
      std::memcpy(&y, &x, sizeof y);
      return y;
    });
  });
}

uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1FFFu : bits;  // to 10 bits of mantissa, ties away from zero
}

void copy_async(void* to, const void* from, int bytes) {
  emulator::check_shared(to, 16, 16);
  if (bytes < 0 || bytes > 16) emulator::fail("copy_async: more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("copy_async: misaligned source");
  emulator::block->running->copies.push_back({to, from, bytes});
}

void copy_async_commit() {
  emulator::Fiber& fiber = *emulator::block->running;
  if (emulator::block->index % 2 == 1) {
    emulator::land(fiber.copies);
    fiber.copies.clear();
  }
  fiber.committed.push_back(std::move(fiber.copies));
  fiber.copies = {};
}

void copy_async_wait_until(int pending) {
  auto& committed = emulator::block->running->committed;
  for (; static_cast<int>(committed.size()) > pending; committed.pop_front()) emulator::land(committed.front());
}

}  // namespace smattn::cuda
