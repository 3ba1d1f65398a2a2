// Blocks, warps and fibers, their barriers, and copies that take time.
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
  int size, bytes;
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

void barrier() {
  Block& b = *block;
  if (++b.at_barrier < static_cast<int>(b.fibers.size())) return hold();
  b.at_barrier = 0;
  for (Fiber& fiber : b.fibers) fiber.holding = false;
}

void land(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::memset(copy.to, 0, static_cast<size_t>(copy.size));
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
}

}  // namespace
}  // namespace emulator

int thread_index() { return emulator::block->running->thread; }
int64_t block_index() { return emulator::block->index; }

void sync_warp() {
  emulator::collective("sync_warp", nullptr, [](void* const*) {});
}

void sync_block() { emulator::barrier(); }

void copy_async_of(int size, void* to, const void* from, int bytes) {
  emulator::check_shared(to, size, size);
  if (bytes < 0 || bytes > size) emulator::fail("copy_async: more bytes than its size");
  if (reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(size) != 0) emulator::fail("copy_async: misaligned source");
  emulator::block->running->copies.push_back({to, from, size, bytes});
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
