// How forward's work is planned.
#pragma once

#include "cpu/forward_part.h"
#include "memory.h"

namespace smattn::cpu::SMATTN_UNIT {

// How forward is cut into items that run in parallel: (batch, group of heads, query block, split of the keys). Where batch elements share
// M, a few of them follow each other, and the tiles of M for a query block are kept for the next one, as far as a core's cache holds them.
template <class E>
struct ForwardPlan {
  using T = SumOf<E>;

  Blocking<T> blocking;
  int64_t group_heads, groups, splits;
  int64_t mask_tile_size, mask_tiles;  // of a worker
  int64_t batches;  // that follow each other

  ForwardPlan(const Scores& s, int64_t threads) : blocking(s.size), s_(s) {
    const Sizes& n = s.size;
    constexpr int64_t kGroupBytes = 256 << 10, kPartBytes = kPromisedBytes / 2, kItems = 16;
    const int64_t head_bytes = blocking.queries * (n.D + n.Dv) * static_cast<int64_t>(sizeof(T));
    group_heads = smaller_of(n.H, larger_of<int64_t>(1, kGroupBytes / larger_of<int64_t>(head_bytes, 1)));
    groups = blocks_of(n.H, larger_of<int64_t>(group_heads, 1));
    const int64_t uncut = larger_of<int64_t>(1, n.B * groups * blocking.query_blocks);
    const int64_t part_bytes = larger_of<int64_t>(1, n.B * n.H * blocking.query_blocks * part_size(n) * static_cast<int64_t>(sizeof(T)));
    splits = smaller_of(smaller_of(blocks_of(kItems, uncut), larger_of<int64_t>(1, kPartBytes / part_bytes)),
                        larger_of<int64_t>(1, blocking.key_blocks));
    // No result depends on how many heads an item has: so few that their tiles of M can be kept, and where threads are many fewer, which
    // then read M more often.
    mask_tile_size = round_up(blocking.keys, kLanes<T>) * blocking.queries;
    const int64_t mask_bytes = larger_of<int64_t>(1, blocking.key_blocks * mask_tile_size * static_cast<int64_t>(sizeof(T)));
    const bool shared = s.mask.data != nullptr && s.mask_batch.sharers(n.B) > 1, by_head = s.mask_size[1] > 1;
    constexpr int64_t kMaskBytes = 256 << 10;  // about what a worker has besides: with more, memory would hold far fewer workers
    const bool keeps_masks = shared && mask_bytes <= kMaskBytes;
    if (keeps_masks && by_head) {
      group_heads = smaller_of(group_heads, kMaskBytes / mask_bytes);
      groups = blocks_of(n.H, larger_of<int64_t>(group_heads, 1));
    }
    constexpr int64_t kBatches = 16;  // M is read seldom, and their keys and values are still near for the next query block
    batches = keeps_masks ? kBatches : 1;
    while (group_heads > 1 && items() < 2 * threads) {
      group_heads = blocks_of(group_heads, 2);
      groups = blocks_of(n.H, group_heads);
    }
    mask_tiles = keeps_masks ? (by_head ? group_heads : 1) * blocking.key_blocks : 1;
  }

  int64_t items() const { return s_.size.B * groups * blocking.query_blocks * splits; }
  // The numbered one of them.
  struct Item {
    int64_t b, group, query_block, split;
  };
  Item item(int64_t number) const {
    const int64_t of_a_batch = groups * blocking.query_blocks * splits;
    const int64_t place = number / (batches * of_a_batch) * batches, together = smaller_of(batches, s_.size.B - place);
    const int64_t rest = number - place * of_a_batch, part = rest / together;
    return {.b = s_.mask_batch.at_place(place + rest % together, s_.size.B),
            .group = part / (splits * blocking.query_blocks),
            .query_block = part / splits % blocking.query_blocks,
            .split = part % splits};
  }
  // Where M's tile of one of a group's heads and a key block lies.
  int64_t mask_tile(int64_t head, int64_t key_block) const {
    return mask_tiles == 1 ? 0 : (s_.mask_size[1] > 1 ? head : 0) * blocking.key_blocks + key_block;
  }

  int64_t part_size(const Sizes& n) const { return ForwardPart<E>::size(n, blocking.queries); }

 private:
  const Scores& s_;
};

}  // namespace smattn::cpu::SMATTN_UNIT
