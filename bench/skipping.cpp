// Forward and backward of csrc/cpu that leave out the tiles which the mask has decided, for skipping.py, where it is proven that they may.
// One thread, contiguous tensors, no padding.
#if defined(__AVX512BF16__)
#define SMATTN_UNIT avx512bf16
#else
#define SMATTN_UNIT avx512
#endif
#include "cpu/backward.h"

namespace smattn::cpu::SMATTN_UNIT {

struct Call {
  Sizes size;
  int64_t mask_queries;  // Nq or 1
  double scale;
  const void *query, *key, *value;
  const float *mask, *alpha;  // [B, Nq|1, Nk], [H]
  const float* bounds;        // U, [B, H, key block, Nq]; null: no tile is left out
  const int64_t* order;       // of forward's visits, [B, query block, key block]; null: as they lie
  double margin;              // log(Nk / u)
  int64_t* left_out;          // counts tiles

  // Whether every row's scores are far enough below line(row): what of its L is known.
  template <class Line>
  bool leaves_out(int64_t b, int64_t h, const QueryBlock& q, int64_t kb, int64_t key_blocks, const Line& line) const {
    if (bounds == nullptr) return false;
    const float* bound = bounds + ((b * size.H + h) * key_blocks + kb) * size.Nq + q.first;
    for (int64_t i = 0; i < q.count; ++i) {
      if (!(bound[i] + margin <= line(i))) return false;  // nor a NaN
    }
    ++*left_out;
    return true;
  }
};

static Tensor4 dense(const void* data, DType dtype, int64_t heads, int64_t rows, int64_t columns) {
  return {data, dtype, {heads * rows * columns, rows * columns, columns, 1}};
}

template <class E>
static Scores scores_of(const Call& c) {
  const Sizes& n = c.size;
  Scores s{};
  s.size = n, s.dtype = kStored<E>, s.scale = c.scale, s.alpha = c.alpha, s.alpha_stride = 1;
  s.query = dense(c.query, s.dtype, n.H, n.Nq, n.D), s.key = dense(c.key, s.dtype, n.Hkv, n.Nk, n.D);
  s.mask = {c.mask, DType::kFloat32, {c.mask_queries * n.Nk, 0, c.mask_queries == 1 ? 0 : n.Nk, 1}};
  s.mask_size[0] = n.B, s.mask_size[1] = 1, s.mask_size[2] = c.mask_queries;
  return s;
}

template <class E>
struct SkippingForward : Forward<E> {
  using Base = Forward<E>;
  using T = typename Base::T;
  using Base::n_, Base::part_size_, Base::plan_, Base::s_;

  const Call& call;
  SkippingForward(const Call& c, const ForwardTask<T>& task, const ForwardPlan<E>& plan) : Base(task, plan), call(c) {}

  void run(int64_t b, int64_t group, int64_t qb) {
    const QueryBlock q = query_block(plan_.blocking, qb);
    const int64_t first = group * plan_.group_heads, heads = smaller_of(plan_.group_heads, n_.H - first), rows = q.lanes * this->Dvp_;
    for (int64_t h = 0; h < heads; ++h) {
      T* part = this->part_ + h * part_size_;
      read_queries<E>(s_.query, b, first + h, q, n_.D, static_cast<T>(s_.scale * kLog2e), this->query_rows_, this->query(h));
      fill<T>(part, part_size_, T(0));
      fill<T>(part + rows, q.lanes, static_cast<T>(-__builtin_inf()));
    }
    const int64_t blocks = plan_.blocking.key_blocks;
    const auto visited = [&](int64_t n) {
      return call.order == nullptr ? n : call.order[(b * plan_.blocking.query_blocks + qb) * blocks + n];
    };
    for (int64_t n = 0; n < blocks; ++n) {
      const KeyBlock k = key_block(s_, plan_.blocking, b, visited(n));
      const int64_t next_first = n + 1 < blocks ? visited(n + 1) * plan_.blocking.keys : n_.Nk;
      int64_t last_kv = -1;
      for (int64_t h = 0; h < heads; ++h) {
        T* part = this->part_ + h * part_size_;
        const T *maxima = part + rows, *sums = maxima + kSum * q.lanes;
        if (call.leaves_out(b, first + h, q, visited(n), blocks,
                            [&](int64_t i) { return to_natural(maxima[i]) + __builtin_log(sums[i]); })) {
          continue;
        }
        if (last_kv < 0) read_mask<T>(s_, b, first, q, k, this->rows_, this->mask_);
        const bool last = h == heads - 1;
        const Prefetch keys =
            keys_ahead(s_.key, n_, b, last ? first : first + h + 1, last ? next_first : k.first, plan_.blocking.keys, n_.D);
        const int64_t g = kv_head(n_, first + h);
        this->attend(b, first + h, q, k, this->mask_, g == last_kv, this->query(h), nullptr, part, keys);
        last_kv = g;
      }
    }
    for (int64_t h = 0; h < heads; ++h) this->write(b, first + h, q, this->part_ + h * part_size_);
  }
};

template <class E>
struct SkippingBackward : Backward<E> {
  using Base = Backward<E>;
  using T = typename Base::T;
  using Base::k_, Base::n_, Base::pairs_, Base::plan_;

  const Call& call;
  SkippingBackward(const Call& c, const BackwardTask<T>& task, const BackwardPlan<T>& plan, BackwardParts<T>& parts)
      : Base(task, plan, parts), call(c) {}

  // Base::run, but for what visit does not see.
  void run(int64_t group, int64_t slot, int64_t split) {
    for (int64_t pair = 0; pair < plan_.pairs; ++pair) pairs_[pair] = plan_.pair(group, pair);
    this->slot_ = slot;
    fill<T>(this->dalpha_, plan_.pairs * kQueries, T(0));
    this->clear_own_part(split);
    const int64_t outer = plan_.outer_blocks(), inner = plan_.inner_blocks();
    for (int64_t o = outer * split / plan_.splits; o < outer * (split + 1) / plan_.splits; ++o) {
      for (int64_t at = 0; at < inner * plan_.pairs; ++at) {
        plan_.pairs_innermost ? visit(split, o, at / plan_.pairs, at % plan_.pairs) : visit(split, o, at % inner, at / inner);
      }
    }
    for (int64_t pair = 0; pair < plan_.pairs; ++pair) {
      T sum = 0;
      for (int64_t i = 0; i < kQueries; ++i) sum += this->dalpha_[pair * kQueries + i];
      this->parts_.dalpha[split * this->parts_.dalpha_size + pairs_[pair].b * n_.H + pairs_[pair].h] = sum;
    }
    drain();
  }

  // To Base's visit, a tile that is left out is one of padding.
  void visit(int64_t split, int64_t o, int64_t i, int64_t pair) {
    const int64_t kb = plan_.outer_keys ? o : i, qb = plan_.outer_keys ? i : o;
    if (this->block_read_.differs(0, kb, 0, 0)) k_ = key_block(this->t_.scores, plan_.blocking, 0, kb);
    const QueryBlock q = query_block(plan_.blocking, qb);
    const T* lse = this->t_.lse + (pairs_[pair].b * n_.H + pairs_[pair].h) * n_.Nq + q.first;
    const bool left_out =
        call.leaves_out(pairs_[pair].b, pairs_[pair].h, q, kb, plan_.blocking.key_blocks, [lse](int64_t i) { return lse[i]; });
    k_.attended = left_out ? 0 : k_.count;
    Base::visit(split, o, i, pair);
  }
};

static void on_this_thread(int64_t items, int64_t, void (*body)(int64_t, int64_t, void*), void* context) { body(0, items, context); }

template <class E>
static void forward(const Call& c, void* out, float* lse, float* mbar) {
  const Sizes& n = c.size;
  ForwardTask<float> task{};
  task.params.scores = scores_of<E>(c), task.params.value = dense(c.value, kStored<E>, n.Hkv, n.Nk, n.Dv);
  task.params.out = out, task.params.lse = lse, task.params.mbar = mbar;
  ForwardPlan<E> plan(n);
  plan.splits = 1;
  SkippingForward<E> forward(c, task, plan);
  for (int64_t b = 0; b < n.B; ++b) {
    for (int64_t group = 0; group < plan.groups; ++group) {
      for (int64_t qb = 0; qb < plan.blocking.query_blocks; ++qb) forward.run(b, group, qb);
    }
  }
}

static void backward(const Call& c, const float* dout, const float* out, const float* lse, const float* mbar, float* dquery, float* dkey,
                     float* dvalue, float* dmask, float* dalpha) {
  const Sizes& n = c.size;
  BackwardTask<float> task{};
  task.scores = scores_of<float>(c), task.value = dense(c.value, DType::kFloat32, n.Hkv, n.Nk, n.Dv);
  task.dout = dense(dout, DType::kFloat32, n.H, n.Nq, n.Dv), task.lse = lse, task.mbar = mbar;
  task.dquery = dquery, task.dkey = dkey, task.dvalue = dvalue, task.dmask = dmask, task.dalpha = dalpha;
  BackwardParams params{};
  params.scores = task.scores, params.value = task.value, params.dout = task.dout;
  params.out = dense(out, DType::kFloat32, n.H, n.Nq, n.Dv);
  const Buffer<float> delta(n.B * n.H * n.Nq);
  compute_delta<float>(params, on_this_thread, delta.get());
  task.delta = delta;
  const BackwardPlan<float> plan(task);
  BackwardParts<float> parts(task, plan);
  SkippingBackward<float> backward(c, task, plan, parts);
  for (int64_t first = 0; first < plan.groups; first += plan.round) {
    const int64_t groups = smaller_of(plan.round, plan.groups - first);
    for (int64_t item = 0; item < groups * plan.splits; ++item) {
      backward.run(first + item / plan.splits, item / plan.splits, item % plan.splits);
    }
    if (plan.dmask_rows > 0) store_key_dmask(task, plan, parts, first, groups, on_this_thread);
    for (int64_t item = 0; plan.wants_parts && item < plan.part_items() / plan.round * groups; ++item) {
      store_sum(task, plan, parts, first, item);
    }
  }
  store_dalpha<float>(task, plan, parts, nullptr);
}

}  // namespace smattn::cpu::SMATTN_UNIT

using namespace smattn::cpu::SMATTN_UNIT;

// Query blocks, queries in each, key blocks, keys in each.
extern "C" void blocking(const Call& call, int64_t* to) {
  const Blocking<float> b(call.size);
  to[0] = b.query_blocks, to[1] = b.queries, to[2] = b.key_blocks, to[3] = b.keys;
}

extern "C" void forward_float32(const Call& call, float* out, float* lse, float* mbar) { forward<float>(call, out, lse, mbar); }

#if defined(__AVX512BF16__)
extern "C" void forward_bfloat16(const Call& call, void* out, float* lse, float* mbar) { forward<BFloat16Pair>(call, out, lse, mbar); }
#endif

extern "C" void backward_float32(const Call& call, const float* dout, const float* out, const float* lse, const float* mbar, float* dquery,
                                 float* dkey, float* dvalue, float* dmask, float* dalpha) {
  backward(call, dout, out, lse, mbar, dquery, dkey, dvalue, dmask, dalpha);
}
