// The attention map (9) where memory holds the weights of some heads over all keys: every score is made once.
#pragma once

#include "cpu/map_weights.h"
#include "cpu/workers.h"

namespace smattn::cpu::SMATTN_UNIT {

// The softmax alone of a map's scores: its rows, and a value without columns.
inline ForwardParams softmax_of(const MapParams& p) {
  ForwardParams softmax{};
  softmax.scores = p.scores;
  softmax.scores.size.Dv = 0;
  softmax.lse = p.lse, softmax.normalizer = p.normalizer;
  return softmax;
}

// A tile of the map, [key][lane], to where it belongs. rows: as large as a tile, overwritten.
template <class T>
inline void store_map_tile(const MapParams& p, int64_t b, const QueryBlock& q, const KeyBlock& k, const T* tile, T* rows) {
  const Sizes& n = p.scores.size;
  const int64_t stride = round_up(k.count, kLanes<T>);
  transpose_block<T>(tile, q.lanes, stride, q.lanes, rows, stride);
  write_rows<T>(rows, stride, q.count, k.count, p.map, kStored<T>, (b * n.Nq + q.first) * n.Nk + k.first, n.Nk);
}

// So many heads of a block at a time, and so many blocks, as memory holds weights of; an item is a block and a split of its keys. First the
// items make weights, then the rows of the splits are merged, and last the heads' weights are added up for one key block after the other.
// All this depends on the shape alone.
template <class T>
struct MapPlan {
  MapShape<T> shape;
  int64_t blocks;

  explicit MapPlan(const Sizes& n) : shape(n), blocks(n.B * shape.blocking.query_blocks) {
    constexpr int64_t kQueryBytes = 256 << 10;
    const int64_t fit = shape.kMostBytes / larger_of<int64_t>(1, shape.head_bytes()),
                  query_bytes = MapWorker<T>::query_bytes(shape.blocking, n, 1);
    shape.heads = smaller_of(smaller_of(n.H, fit), larger_of<int64_t>(1, kQueryBytes / larger_of<int64_t>(1, query_bytes)));
    if (shape.heads < n.H) shape.heads = smaller_of(shape.heads, fit - 1);  // the sum over the heads before takes the place of one
    shape.blocks = shape.heads < n.H ? 1 : smaller_of(blocks, fit / larger_of<int64_t>(1, n.H));
    shape.splits = smaller_of(shape.most_splits(), blocks_of(shape.kItems, larger_of<int64_t>(1, shape.blocks)));
  }

  bool serves() const { return shape.heads > 0; }
  int64_t batch(int64_t block) const { return block / shape.blocking.query_blocks; }
  int64_t query_block(int64_t block) const { return block % shape.blocking.query_blocks; }
};

// Adds up the map's tiles.
template <class T>
class MapSum {
 public:
  // before: [key][lane], the sums of the heads before, where they are not all there at a time.
  MapSum(const MapParams& params, const MapPlan<T>& plan, const MapWeights<T>& of, T* before)
      : p_(params), plan_(plan), of_(of), before_(before), tile_(kKeys * kQueries), rows_(kKeys * kQueries) {}

  int64_t bytes() const { return bytes_in(tile_, rows_); }

  // What a round's heads have in a key block: stored in the map, or where more heads come, for them to go on from.
  void run(int64_t block, int64_t slot, int64_t key_index, int64_t first_head, int64_t heads) {
    const Sizes& n = p_.scores.size;
    const int64_t b = plan_.batch(block);
    const QueryBlock q = query_block(plan_.shape.blocking, plan_.query_block(block));
    const KeyBlock k = key_block(p_.scores, plan_.shape.blocking, b, key_index);
    const int64_t at = k.first * q.lanes, size = k.count * q.lanes;
    first_head == 0 ? fill<T>(tile_, size, T(0)) : copy<T>(before_ + at, size, tile_);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t place = slot * plan_.shape.heads + h;
      const T head_weight = static_cast<const T*>(p_.head_weights)[first_head + h];
      add_head(head_weight, of_.weights_of(place) + at, of_.factors_of(place, plan_.shape.split_of(key_index)), q, k);
    }
    if (first_head + heads < n.H) return copy<T>(tile_, size, before_ + at);
    store_map_tile<T>(p_, b, q, k, tile_, rows_);
  }

 private:
  void add_head(T head_weight, const T* weights, const T* factors, const QueryBlock& q, const KeyBlock& k) {
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      const KeptWeights<T> kept(weights + lane, q.lanes, factors + lane);
      const Vec<T> share = kept.factor * head_weight;
      for (int64_t j = 0; j < k.count; ++j) {
        if (k.padded[j]) continue;  // 0, whatever the factor
        T* sum = tile_ + j * q.lanes + lane;
        store(sum, fused(share, kept(j), load(sum)));
      }
    }
  }

  const MapParams& p_;
  const MapPlan<T>& plan_;
  const MapWeights<T>& of_;
  T* before_;
  Buffer<T> tile_, rows_;
};

template <class T>
inline void map_by_rows(const MapParams& p, const MapPlan<T>& plan, ParallelFor threads) {
  const int64_t H = p.scores.size.H, key_blocks = plan.shape.blocking.key_blocks, splits = plan.shape.splits;
  const MapWeights<T> weights(plan.shape);
  const Buffer<T> before(plan.shape.heads < H ? plan.shape.head_size() : 0);
  const int64_t spare = kSpareBytes - weights.bytes() - before.bytes();
  const ForwardTask<T> softmax{.params = softmax_of(p)};
  const auto make = [&] { return MapWorker<T>(softmax, weights); };
  for (int64_t first = 0; first < plan.blocks; first += plan.shape.blocks) {
    const int64_t blocks = smaller_of(plan.shape.blocks, plan.blocks - first);
    for (int64_t head = 0; head < H; head += plan.shape.heads) {
      const int64_t heads = smaller_of(plan.shape.heads, H - head);
      for_each_item(threads, blocks * splits, spare, make, [&](MapWorker<T>& worker, int64_t item) {
        const int64_t slot = item / splits, block = first + slot;
        worker.run(plan.batch(block), plan.query_block(block), slot, item % splits, head, heads);
      });
      parallel_for(threads, blocks * heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t slot = item / heads, h = item % heads, block = first + slot;
          merge_rows<T>(softmax, weights, plan.batch(block), head + h, plan.query_block(block), slot * plan.shape.heads + h);
        }
      });
      const auto sums = [&] { return MapSum<T>(p, plan, weights, before.get()); };
      for_each_item(threads, blocks * key_blocks, spare, sums, [&](MapSum<T>& sum, int64_t item) {
        sum.run(first + item / key_blocks, item / key_blocks, item % key_blocks, head, heads);
      });
    }
  }
}

}  // namespace smattn::cpu::SMATTN_UNIT
