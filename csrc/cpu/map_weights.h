// The weights of the attention map's softmax, of some heads over all keys, kept so that every score is made once: forward (9) adds them up
// when their sums are there, and backward (10) makes dS of them when the means of dA are.
#pragma once

#include "cpu/forward_part.h"
#include "cpu/tiles/mask.h"
#include "cpu/tiles/rows.h"
#include "cpu/tiles/weights.h"

namespace smattn::cpu::SMATTN_UNIT {

// A probability below this, a power of 2, is 0 to the map: times a head weight that is not tiny itself it would be no normal number.
template <class T>
constexpr T kLowestInMap = Exp2<T>::kLowest + 26;
template <class T>
constexpr T kLeastInMap = Exp2<T>::kLeast * (1 << 26);

// How many are kept at a time: of so many blocks, each a batch element and a query block, with so many heads. The keys are split, and the
// weights of a split are relative to its greatest scores.
template <class T>
struct MapShape {
  Blocking<T> blocking;
  int64_t blocks = 0, heads = 0, splits = 0;

  explicit MapShape(const Sizes& n) : blocking(n) {}

  static constexpr int64_t kMostBytes = kPromisedBytes / 2;
  static constexpr int64_t kItems = 16;  // (block, split)s wanted side by side

  int64_t head_size() const { return blocking.Nk * blocking.queries; }  // of a block's head, [key][lane]
  int64_t part_size() const { return ForwardPart<T>::size({}, blocking.queries); }
  int64_t most_splits() const { return smaller_of(kItems, larger_of<int64_t>(1, blocking.key_blocks)); }
  int64_t head_bytes() const {  // of a block's head, with the most splits
    return (head_size() + most_splits() * (part_size() + blocking.queries)) * static_cast<int64_t>(sizeof(T));
  }
  int64_t first_key_block(int64_t split) const { return blocking.key_blocks * split / splits; }
  int64_t split_of(int64_t key_block) const { return ((key_block + 1) * splits - 1) / blocking.key_blocks; }
};

// The weights, and the rows that go with them. A place is a head of a block.
template <class T>
struct MapWeights {
  MapShape<T> shape;
  Buffer<T> weights;  // [place][key][lane]
  Buffer<T> parts;    // [place][split]
  Buffer<T> factors;  // [place][split][lane], by which weights become P

  explicit MapWeights(const MapShape<T>& shape)
      : shape(shape), weights(places() * shape.head_size()), parts(places() * shape.splits * shape.part_size()),
        factors(places() * shape.splits * shape.blocking.queries) {}

  int64_t bytes() const { return bytes_in(weights, parts, factors); }
  int64_t places() const { return shape.blocks * shape.heads; }
  T* weights_of(int64_t place) const { return weights + place * shape.head_size(); }
  T* parts_of(int64_t place) const { return parts + place * shape.splits * shape.part_size(); }
  T* factors_of(int64_t place, int64_t split) const { return factors + (place * shape.splits + split) * shape.blocking.queries; }
  ForwardPart<T> part(int64_t place, int64_t split, const QueryBlock& q) const {
    return {parts_of(place) + split * shape.part_size(), q.lanes, 0};
  }
};

// Makes the weights of a block and a split, whose sums, and means of M and dA where the task wants them, go to the parts.
template <class T>
class MapWorker {
 public:
  MapWorker(const ForwardTask<T>& task, const MapWeights<T>& to)
      : t_(task), s_(task.params.scores), n_(s_.size), to_(to), shape_(to.shape),
        query_size_(shape_.blocking.queries * round_up(n_.D, kLanes<T>)), queries_(shape_.heads * query_size_), query_rows_(query_size_),
        keys_(kKeys * round_up(n_.D, kLanes<T>)), rows_(kLanes<T> * kKeys), mask_(kKeys * kQueries),
        dmap_(task.eta != nullptr ? kKeys * kQueries : 0) {}

  int64_t bytes() const { return bytes_in(queries_, query_rows_, keys_, rows_, mask_, dmap_); }
  static int64_t query_bytes(const Blocking<T>& blocking, const Sizes& n, int64_t heads) {  // of a worker's queries
    return heads * blocking.queries * round_up(n.D, kLanes<T>) * static_cast<int64_t>(sizeof(T));
  }

  // slot: the block's number among those that are kept.
  void run(int64_t b, int64_t query_index, int64_t slot, int64_t split, int64_t first_head, int64_t heads) {
    const QueryBlock q = query_block(shape_.blocking, query_index);
    const int64_t place = slot * shape_.heads;
    for (int64_t h = 0; h < heads; ++h) {
      to_.part(place + h, split, q).clear(q.count);
      read_queries<T>(s_.query, b, first_head + h, q, n_.D, query_rows_, queries_ + h * query_size_);
    }
    const auto each_tile = [&](const auto& work) {
      for (int64_t kb = shape_.first_key_block(split); kb < shape_.first_key_block(split + 1); ++kb) {
        const KeyBlock k = key_block(s_, shape_.blocking, b, kb);
        for (int64_t h = 0; h < heads; ++h) {
          work(h, k, to_.part(place + h, split, q), to_.weights_of(place + h) + k.first * q.lanes);
        }
      }
    };
    each_tile([&](int64_t h, const KeyBlock& k, const ForwardPart<T>& part, T* tile) {
      exponents(b, first_head + h, q, k, h == 0, queries_ + h * query_size_, part.row(kMaximum), tile);
    });
    each_tile(
        [&](int64_t h, const KeyBlock& k, const ForwardPart<T>& part, T* tile) { weigh(b, first_head + h, q, k, h == 0, part, tile); });
  }

 private:
  void exponents(int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k, bool first, const T* query, T* maxima, T* tile) {
    if (k.attended == 0) return fill<T>(tile, k.count * q.lanes, static_cast<T>(-__builtin_inf()));
    const T* mask = s_.mask.data == nullptr ? nullptr : read_mask_of(b, h, q, k, first);
    const RowMajor<T> key = read_keys<T>(s_.key, b, kv_head(n_, h), k, n_.D, keys_);
    const Prefetch next = h + 1 < n_.H ? keys_ahead(s_.key, n_, b, h + 1, k.first, k.count, n_.D) : Prefetch{};
    exponents_of(Exponents<T>(s_, h, mask), q, k, key, query, n_.D, next, maxima, tile);
  }

  // Exponents to weights, not yet divided by their sum. The sums of key blocks are added up: in one sum of thousands all roundings may go
  // the same way.
  void weigh(int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k, bool first, const ForwardPart<T>& part, T* tile) {
    const T* mask = t_.wants_mbar() ? read_mask_of(b, h, q, k, first) : nullptr;
    if (t_.eta != nullptr && first) read_tile<T>(t_.dmap, b, 0, q, k, rows_, dmap_);
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      Weighing<T> w{.scores = tile + lane,
                    .mask = mask == nullptr ? nullptr : mask + lane,
                    .dmap = t_.eta == nullptr ? nullptr : dmap_ + lane,
                    .weights = tile + lane,
                    .stride = q.lanes,
                    .keys = k.count,
                    .subtracted = finite_maximum<T>(load(part.row(kMaximum) + lane))};
      w.run();
      const auto add = [&](Row row, Vec<T> x) { store(part.row(row) + lane, load(part.row(row) + lane) + x); };
      add(kSum, w.sum);
      add(kMbar, w.mbar);
      add(kEta, w.eta);
    }
  }

  // first: of the heads that are visited with this key block.
  const T* read_mask_of(int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k, bool first) {
    if (first || s_.mask_size[1] > 1) read_mask<T>(s_, b, h, q, k, rows_, mask_);
    return mask_;
  }

  const ForwardTask<T>& t_;
  const Scores& s_;
  const Sizes& n_;
  const MapWeights<T>& to_;
  const MapShape<T>& shape_;
  const int64_t query_size_;
  Buffer<T> queries_;  // [head], as read_queries leaves them
  Buffer<T> query_rows_, keys_, rows_, mask_, dmap_;
};

// Merges the rows of the splits of a place, of head h of a block, and stores what the task wants of them.
template <class T>
inline void merge_rows(const ForwardTask<T>& task, const MapWeights<T>& of, int64_t b, int64_t h, int64_t query_index, int64_t place) {
  const MapShape<T>& shape = of.shape;
  const QueryBlock q = query_block(shape.blocking, query_index);
  T memory[kRows * kQueries];
  const ForwardPart<T> whole(memory, q.lanes, 0);
  whole.clear(q.count);
  merge_parts<T>(task.params, q, of.parts_of(place), shape.splits, shape.part_size(), whole);
  write_part<T>(task, b, h, q, whole);
  T inverse[kQueries], lowest[kQueries];
  for (int64_t i = 0; i < q.lanes; ++i) {
    const T maximum = whole.row(kMaximum)[i], sum = whole.row(kSum)[i];
    T normalizer[2];
    store_normalizer(normalizer, i < q.count && !is_dead(maximum, sum), maximum, sum);  // 0 beyond the queries too
    inverse[i] = normalizer[1];
    lowest[i] = larger_of(Exp2<T>::kLowest, kLowestInMap<T> - whole_log2(inverse[i]));
  }
  for (int64_t split = 0; split < shape.splits; ++split) {
    const ForwardPart<T> part = of.part(place, split, q);
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      const Vec<T> below = load(part.row(kMaximum) + lane) - finite_maximum<T>(load(whole.row(kMaximum) + lane));
      store(of.factors_of(place, split) + lane, load(inverse + lane) * exp2<T>(below, load(lowest + lane)));
    }
  }
}

// A head's weights at one vector of queries of a key block: P of key number j is factor * (*this)(j).
template <class T>
struct KeptWeights {
  const T* weights;
  int64_t stride;  // from key to key
  Vec<T> factor, least;

  // weights, factors: pointers to the lanes.
  KeptWeights(const T* weights, int64_t stride, const T* factors)
      : weights(weights), stride(stride), factor(load(factors)), least(kLeastInMap<T> / factor) {}

  Vec<T> operator()(int64_t j) const {
    const Vec<T> weight = load(weights + j * stride);
    return weight < least ? Vec<T>{} : weight;
  }
};

}  // namespace smattn::cpu::SMATTN_UNIT
