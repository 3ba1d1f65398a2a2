// Items shared out to workers, each with scratch of its own: no more of them at a time than memory holds. A worker takes the next item
// when it is done with one, so that a thread that comes late, or shares its core, holds nobody up.
#pragma once

#include "cpu/simd/amx.h"
#include "cpu/tiles/buffer.h"
#include "memory.h"
#include "parallel.h"

namespace smattn::cpu::SMATTN_UNIT {

// What kernels may take of kPromisedBytes: the rest goes to the threads' stacks and to the allocator.
constexpr int64_t kSpareBytes = kPromisedBytes - (3 << 20);

// work(worker, item) for every item, by workers that make() makes; at most `bytes` at a time, but one worker always.
template <class Make, class Work>
inline void for_each_item(ParallelFor threads, int64_t items, int64_t bytes, const Make& make, const Work& work) {
  auto first = make();
  const int64_t workers = larger_of<int64_t>(1, bytes / first.bytes());
  int64_t taken = 0;
  const auto take = [&taken] { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); };
  const auto go_on = [&](auto& worker, int64_t item) {
    const TilesInUse tiles;
    for (; item < items; item = take()) work(worker, item);
  };
  parallel_for(threads, items, blocks_of(items, workers), [&](int64_t, int64_t) {
    const int64_t item = take();
    if (item == 0) return go_on(first, item);
    if (item >= items) return;
    auto worker = make();
    go_on(worker, item);
  });
}

}  // namespace smattn::cpu::SMATTN_UNIT
