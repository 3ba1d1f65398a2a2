// Items shared out to workers, each with scratch of its own: no more of them at a time than memory holds. A worker takes the next item
// when it is done with one, so that a thread that comes late, or shares its core, holds nobody up.
#pragma once

#include "cpu/simd/amx.h"
#include "cpu/tiles/buffer.h"
#include "memory.h"
#include "parallel.h"

namespace smattn::cpu::SMATTN_UNIT {

// What kernels may take of kPromisedBytes: the rest goes to the threads' stacks and to the allocator.
constexpr int64_t kSpareBytes = kPromisedBytes - (4 << 20);

// work(worker, item) for every item, by workers that make() makes; at most `bytes` at a time, but one worker always. take(item) puts the
// next item in the place of a worker's last, false where there is none; a worker's first comes after Item{}.
template <class Item, class Take, class Make, class Work>
inline void share_out(ParallelFor threads, int64_t items, int64_t bytes, const Take& take, const Make& make, const Work& work) {
  auto first = make();
  const int64_t workers = larger_of<int64_t>(1, bytes / first.bytes());
  bool first_works = false;
  const auto go_on = [&](auto& worker, Item& item) {
    const TilesInUse tiles;
    do work(worker, item);
    while (take(item));
  };
  // A worker counts as kGrain items. torch gives each thread ceil(items / threads) of them; with one item a worker and a few more workers
  // than threads, that would be two for each, and half of the threads would get none.
  constexpr int64_t kGrain = 1024;
  parallel_for(threads, smaller_of(items, workers) * kGrain, kGrain, [&](int64_t, int64_t) {
    Item item{};
    if (!take(item)) return;
    if (!__atomic_exchange_n(&first_works, true, __ATOMIC_RELAXED)) return go_on(first, item);
    auto worker = make();
    go_on(worker, item);
  });
}

// The same of numbered items, which may be taken in any order.
template <class Make, class Work>
inline void for_each_item(ParallelFor threads, int64_t items, int64_t bytes, const Make& make, const Work& work) {
  int64_t taken = 0;
  const auto take = [&taken, items](int64_t& item) { return (item = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < items; };
  share_out<int64_t>(threads, items, bytes, take, make, work);
}

}  // namespace smattn::cpu::SMATTN_UNIT
