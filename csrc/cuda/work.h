// How a block finds its share of a call, and how it walks over tiles while the next one is on its way.
#pragma once

#include "scores.h"

namespace smattn::cuda {

// A block of queries of one (batch, head), and a range of keys. Heads are the fastest index of the grid, so that those that share a
// tile of M read it together.
struct QueryWork {
  Head at;
  int group;  // kv head
  int query_block, first_query, first_key, last_key, split;

  SMATTN_DEVICE QueryWork(const Sizes& size, int queries, int query_blocks, int64_t splits, int64_t split_keys) {
    const int64_t id = block_index(), rest = id / size.H;
    at = {static_cast<int>(rest / query_blocks / splits), static_cast<int>(id % size.H)};
    group = at.h / static_cast<int>(size.H / size.Hkv);
    query_block = static_cast<int>(rest % query_blocks);
    first_query = query_block * queries;
    split = static_cast<int>(rest / query_blocks % splits);
    const int64_t begin = split * split_keys, end = begin + split_keys;
    first_key = static_cast<int>(begin);
    last_key = static_cast<int>(end < size.Nk ? end : size.Nk);
  }
};

SMATTN_DEVICE int tiles_of(int length, int tile) { return (length + tile - 1) / tile; }

// step(i) for every tile, while load(i + 1), which starts copies into the other of two stages, is under way.
template <class Load, class Step>
SMATTN_DEVICE void pipeline(int tiles, const Load& load, const Step& step) {
  load(0);
  copy_async_commit();
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) {
      load(i + 1);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();  // the tile has landed, for all threads
    step(i);
    sync_block();  // nobody reads it any more
  }
}

}  // namespace smattn::cuda
