// The attention map (9) where memory holds the weights of some heads over all keys: every score is made once.
#pragma once

#include "cpu/forward_part.h"
#include "cpu/tiles/mask.h"
#include "cpu/tiles/weights.h"
#include "cpu/workers.h"

namespace smattn::cpu::SMATTN_UNIT {

// A probability below this, a power of 2, is 0 to the map: times a head weight that is not tiny itself it would be no normal number.
template <class T>
constexpr T kLowestInMap = Exp2<T>::kLowest + 26;
template <class T>
constexpr T kLeastInMap = Exp2<T>::kLeast * (1 << 26);

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

// A block is a batch element and a query block. So many of its heads at a time, and so many blocks, as memory holds weights of; an item is
// a block and a split of its keys. First the items make weights relative to the greatest scores of their splits, then the rows of the
// splits are merged, and last the heads' weights are added up for one key block after the other. All this depends on the shape alone.
template <class T>
struct MapPlan {
  Blocking<T> blocking;
  int64_t head_size;  // of a head's weights, [key][lane]
  int64_t heads;      // at a time
  int64_t blocks, round, splits;

  explicit MapPlan(const Sizes& n) : blocking(n), head_size(n.Nk * blocking.queries), blocks(n.B * blocking.query_blocks) {
    constexpr int64_t kItems = 16, kWeightBytes = kPromisedBytes / 2, kQueryBytes = 256 << 10, kSize = sizeof(T);
    const int64_t most_splits = smaller_of(kItems, larger_of<int64_t>(1, blocking.key_blocks));
    const int64_t head_bytes = (head_size + most_splits * (part_size() + blocking.queries)) * kSize;
    const int64_t fit = kWeightBytes / larger_of<int64_t>(1, head_bytes), query_bytes = blocking.queries * n.D * kSize;
    heads = smaller_of(smaller_of(n.H, fit), larger_of<int64_t>(1, kQueryBytes / larger_of<int64_t>(1, query_bytes)));
    if (heads < n.H) heads = smaller_of(heads, fit - 1);  // the sum over the heads before takes the place of one
    round = heads < n.H ? 1 : smaller_of(blocks, fit / larger_of<int64_t>(1, n.H));
    splits = smaller_of(most_splits, blocks_of(kItems, larger_of<int64_t>(1, round)));
  }

  bool serves() const { return heads > 0; }
  int64_t first_key_block(int64_t split) const { return blocking.key_blocks * split / splits; }
  int64_t split_of(int64_t key_block) const { return ((key_block + 1) * splits - 1) / blocking.key_blocks; }
  int64_t part_size() const { return ForwardPart<T>::size({}, blocking.queries); }
};

// The weights of a round's blocks and heads, and the rows that go with them.
template <class T>
struct MapWeights {
  Buffer<T> weights;  // [block][head][key][lane]
  Buffer<T> sums;     // [key][lane], of the heads before, where they are not all there at a time
  Buffer<T> parts;    // [block][head][split]
  Buffer<T> factors;  // [block][head][split][lane], by which weights become shares of the map

  MapWeights(const MapPlan<T>& plan, int64_t H)
      : weights(plan.round * plan.heads * plan.head_size), sums(plan.heads < H ? plan.head_size : 0),
        parts(plan.round * plan.heads * plan.splits * plan.part_size()),
        factors(plan.round * plan.heads * plan.splits * plan.blocking.queries) {}

  int64_t bytes() const { return bytes_in(weights, sums, parts, factors); }
};

// Makes the weights of an item.
template <class T>
class MapWorker {
 public:
  MapWorker(const MapParams& params, const MapPlan<T>& plan, const MapWeights<T>& to)
      : s_(params.scores), n_(s_.size), plan_(plan), to_(to), query_size_(plan.blocking.queries * round_up(n_.D, kLanes<T>)),
        queries_(plan.heads * query_size_), query_rows_(query_size_), keys_(kKeys * round_up(n_.D, kLanes<T>)), rows_(kLanes<T> * kKeys),
        mask_(kKeys * kQueries) {}

  int64_t bytes() const { return bytes_in(queries_, query_rows_, keys_, rows_, mask_); }

  // slot: the block's place in the round.
  void run(int64_t block, int64_t slot, int64_t split, int64_t first_head, int64_t heads) {
    const int64_t b = block / plan_.blocking.query_blocks;
    const QueryBlock q = query_block(plan_.blocking, block % plan_.blocking.query_blocks);
    const auto weights = [&](int64_t h) { return to_.weights + (slot * plan_.heads + h) * plan_.head_size; };
    const auto part = [&](int64_t h) {
      return ForwardPart<T>(to_.parts + ((slot * plan_.heads + h) * plan_.splits + split) * plan_.part_size(), q.lanes, 0);
    };
    for (int64_t h = 0; h < heads; ++h) {
      part(h).clear();
      read_queries<T>(s_.query, b, first_head + h, q, n_.D, query_rows_, queries_ + h * query_size_);
    }
    const int64_t first_block = plan_.first_key_block(split), end_block = plan_.first_key_block(split + 1);
    for (int64_t kb = first_block; kb < end_block; ++kb) {
      const KeyBlock k = key_block(s_, plan_.blocking, b, kb);
      for (int64_t h = 0; h < heads; ++h) {
        exponents(b, first_head + h, q, k, h == 0, queries_ + h * query_size_, part(h).row(kMaximum), weights(h) + k.first * q.lanes);
      }
    }
    const int64_t first_key = first_block * plan_.blocking.keys, end_key = smaller_of(n_.Nk, end_block * plan_.blocking.keys);
    for (int64_t h = 0; h < heads; ++h) weigh(q, end_key - first_key, part(h), weights(h) + first_key * q.lanes);
  }

 private:
  void exponents(int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k, bool first, const T* query, T* maxima, T* tile) {
    if (k.attended == 0) return fill<T>(tile, k.count * q.lanes, static_cast<T>(-__builtin_inf()));
    const T* mask = s_.mask.data == nullptr ? nullptr : mask_.get();
    if (mask != nullptr && (first || s_.mask_size[1] > 1)) read_mask<T>(s_, b, h, q, k, rows_, mask_);
    const RowMajor<T> key = read_keys<T>(s_.key, b, kv_head(n_, h), k, n_.D, keys_);
    const Prefetch next = h + 1 < n_.H ? keys_ahead(s_.key, n_, b, h + 1, k.first, k.count, n_.D) : Prefetch{};
    exponents_of(Exponents<T>(s_, h, mask), q, k, key, query, n_.D, next, maxima, tile);
  }

  // Exponents to weights, not yet divided by their sum, which goes to the part.
  // Sums of few keys are added up: in one sum of thousands all roundings may go the same way.
  void weigh(const QueryBlock& q, int64_t keys, const ForwardPart<T>& part, T* tile) const {
    for (int64_t first = 0; first < keys; first += kKeys, tile += kKeys * q.lanes) {
      for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
        Weighing<T> w{.scores = tile + lane,
                      .mask = nullptr,
                      .dmap = nullptr,
                      .weights = tile + lane,
                      .stride = q.lanes,
                      .keys = smaller_of(kKeys, keys - first),
                      .subtracted = finite_maximum<T>(load(part.row(kMaximum) + lane))};
        w.run();
        T* sum = part.row(kSum) + lane;
        store(sum, load(sum) + w.sum);
      }
    }
  }

  const Scores& s_;
  const Sizes& n_;
  const MapPlan<T>& plan_;
  const MapWeights<T>& to_;
  const int64_t query_size_;
  Buffer<T> queries_;  // [head][D][lane]
  Buffer<T> query_rows_, keys_, rows_, mask_;
};

// Merges the rows of the splits of a block's head, and stores them. place: of the head in the round.
template <class T>
inline void merge_rows(const ForwardTask<T>& softmax, const MapPlan<T>& plan, const MapWeights<T>& of, int64_t block, int64_t h,
                       int64_t place) {
  const QueryBlock q = query_block(plan.blocking, block % plan.blocking.query_blocks);
  T memory[kRows * kQueries];
  const ForwardPart<T> whole(memory, q.lanes, 0);
  whole.clear();
  T* parts = of.parts + place * plan.splits * plan.part_size();
  merge_parts<T>(softmax.params, q, parts, plan.splits, plan.part_size(), whole);
  write_part<T>(softmax, block / plan.blocking.query_blocks, h, q, whole);
  T inverse[kQueries], lowest[kQueries];
  for (int64_t i = 0; i < q.lanes; ++i) {
    const T maximum = whole.row(kMaximum)[i], sum = whole.row(kSum)[i];
    T normalizer[2];
    store_normalizer(normalizer, !is_dead(maximum, sum), maximum, sum);
    inverse[i] = normalizer[1];
    lowest[i] = larger_of(Exp2<T>::kLowest, kLowestInMap<T> - whole_log2(inverse[i]));
  }
  for (int64_t split = 0; split < plan.splits; ++split) {
    const ForwardPart<T> part(parts + split * plan.part_size(), q.lanes, 0);
    T* factors = of.factors + (place * plan.splits + split) * plan.blocking.queries;
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      const Vec<T> below = load(part.row(kMaximum) + lane) - finite_maximum<T>(load(whole.row(kMaximum) + lane));
      store(factors + lane, load(inverse + lane) * exp2<T>(below, load(lowest + lane)));
    }
  }
}

// Adds up the map's tiles.
template <class T>
class MapSum {
 public:
  MapSum(const MapParams& params, const MapPlan<T>& plan, const MapWeights<T>& of)
      : p_(params), plan_(plan), of_(of), tile_(kKeys * kQueries), rows_(kKeys * kQueries) {}

  int64_t bytes() const { return bytes_in(tile_, rows_); }

  // What a round's heads have in a key block: stored in the map, or where more heads come, for them to go on from.
  void run(int64_t block, int64_t slot, int64_t key_index, int64_t first_head, int64_t heads) {
    const Sizes& n = p_.scores.size;
    const int64_t b = block / plan_.blocking.query_blocks;
    const QueryBlock q = query_block(plan_.blocking, block % plan_.blocking.query_blocks);
    const KeyBlock k = key_block(p_.scores, plan_.blocking, b, key_index);
    const int64_t at = k.first * q.lanes, size = k.count * q.lanes;
    first_head == 0 ? fill<T>(tile_, size, T(0)) : copy<T>(of_.sums + at, size, tile_);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t place = slot * plan_.heads + h;
      add_head(static_cast<const T*>(p_.head_weights)[first_head + h], of_.weights + place * plan_.head_size + at,
               of_.factors + (place * plan_.splits + plan_.split_of(key_index)) * plan_.blocking.queries, q, k);
    }
    if (first_head + heads < n.H) return copy<T>(tile_, size, of_.sums + at);
    store_map_tile<T>(p_, b, q, k, tile_, rows_);
  }

 private:
  void add_head(T head_weight, const T* weights, const T* factors, const QueryBlock& q, const KeyBlock& k) {
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      const Vec<T> factor = load(factors + lane), least = kLeastInMap<T> / factor, share = factor * head_weight;
      for (int64_t j = 0; j < k.count; ++j) {
        if (k.padded[j]) continue;  // 0, whatever the factor
        const Vec<T> weight = load(weights + j * q.lanes + lane);
        T* sum = tile_ + j * q.lanes + lane;
        store(sum, fused(share, weight < least ? Vec<T>{} : weight, load(sum)));
      }
    }
  }

  const MapParams& p_;
  const MapPlan<T>& plan_;
  const MapWeights<T>& of_;
  Buffer<T> tile_, rows_;
};

template <class T>
inline void map_by_rows(const MapParams& p, const MapPlan<T>& plan, ParallelFor threads) {
  const int64_t H = p.scores.size.H, key_blocks = plan.blocking.key_blocks;
  const MapWeights<T> weights(plan, H);
  const ForwardTask<T> softmax{.params = softmax_of(p)};
  const auto make = [&] { return MapWorker<T>(p, plan, weights); };
  for (int64_t first = 0; first < plan.blocks; first += plan.round) {
    const int64_t blocks = smaller_of(plan.round, plan.blocks - first);
    for (int64_t head = 0; head < H; head += plan.heads) {
      const int64_t heads = smaller_of(plan.heads, H - head);
      for_each_item(threads, blocks * plan.splits, kSpareBytes - weights.bytes(), make, [&](MapWorker<T>& worker, int64_t item) {
        worker.run(first + item / plan.splits, item / plan.splits, item % plan.splits, head, heads);
      });
      parallel_for(threads, blocks * heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t slot = item / heads, h = item % heads;
          merge_rows<T>(softmax, plan, weights, first + slot, head + h, slot * plan.heads + h);
        }
      });
      const auto sums = [&] { return MapSum<T>(p, plan, weights); };
      for_each_item(threads, blocks * key_blocks, kSpareBytes - weights.bytes(), sums, [&](MapSum<T>& sum, int64_t item) {
        sum.run(first + item / key_blocks, item / key_blocks, item % key_blocks, head, heads);
      });
    }
  }
}

}  // namespace smattn::cpu::SMATTN_UNIT
