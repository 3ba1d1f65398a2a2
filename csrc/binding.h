// What the doors from torch share: the schemas of the raw ops, and the checks of what an op is handed on its way into the kernels' plain
// structs. Every size is checked against every other, so that no kernel reads or writes out of bounds. Of torch this includes the stable
// C++ ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "huge_pages.h"
#include "params.h"

// `where`: arguments of one library alone, each with its comma.
#define SMATTN_SCORES "Tensor query, Tensor key, "
#define SMATTN_MASK "Tensor? mask, bool mask_is_logits, Tensor? alpha, "
#define SMATTN_FORWARD(where)                                                                                                          \
  "forward(" SMATTN_SCORES "Tensor value, " SMATTN_MASK "Tensor? key_padding_mask, Tensor? seed, float scale, float dropout_p, " where \
  "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? remainder, Tensor(d!)? mbar, Tensor(e!)? normalizer) -> ()"
#define SMATTN_BACKWARD(where)                                                                          \
  "backward(Tensor dout, Tensor? dlse, " SMATTN_SCORES "Tensor value, " SMATTN_MASK                     \
  "Tensor? key_padding_mask, Tensor? seed, Tensor? out, Tensor? remainder, Tensor? lse, Tensor? mbar, " \
  "Tensor? normalizer, float scale, float dropout_p, " where                                            \
  "Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dvalue, Tensor(d!)? dmask, Tensor(e!)? dalpha) -> ()"
#define SMATTN_ATTENTION_MAP(where)                                                                               \
  "attention_map(" SMATTN_SCORES SMATTN_MASK "Tensor head_weights, Tensor? key_padding_mask, float scale, " where \
  "Tensor(a!) map, Tensor(b!) lse, Tensor(c!)? normalizer) -> ()"
#define SMATTN_ATTENTION_MAP_BACKWARD(where)                                                            \
  "attention_map_backward(Tensor dmap, " SMATTN_SCORES SMATTN_MASK                                      \
  "Tensor head_weights, Tensor? key_padding_mask, Tensor? lse, Tensor? normalizer, float scale, " where \
  "Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dmask, Tensor(d!)? dalpha, Tensor(e!)? dhead_weights) -> ()"

namespace smattn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float16, bfloat16, float32 or float64");
  return DType::kFloat32;
}

// What the scores of an op are made of.
struct Inputs {
  const Tensor &query, &key;
  const Optional& mask;
  bool mask_is_logits;
  const Optional &alpha, &padding;
  double scale;
};

// Where the gradients that attention and its map have alike are to be written, none where they are not asked for.
struct Gradients {
  const Optional &dquery, &dkey, &dmask, &dalpha;

  bool any() const { return dquery.has_value() || dkey.has_value() || dmask.has_value() || dalpha.has_value(); }
};

// Checks the tensors of one call, which all lie where its query does.
class Reader {
 public:
  const ScalarType dtype, acc;  // of query, and what it is accumulated in
  const ScalarType remainder;   // what holds RemainderOf query's dtype
  Scores scores{};

  explicit Reader(const Inputs& in)
      : dtype(in.query.scalar_type()), acc(dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        remainder(dtype == ScalarType::BFloat16 ? ScalarType::Short : dtype), query_(in.query), mask_(in.mask) {
    STD_TORCH_CHECK(in.query.dim() == 4 && in.key.dim() == 4, "query, key: expected 4 dimensions, got ", in.query.dim(), " and ",
                    in.key.dim());
    const int64_t H = in.query.size(1), Hkv = in.key.size(1);
    STD_TORCH_CHECK(Hkv > 0 && H % Hkv == 0, "key: expected a number of heads that divides query's ", H, ", got ", Hkv);
    Sizes& n = scores.size;
    n = {.B = in.query.size(0), .H = H, .Hkv = Hkv, .Nq = in.query.size(2), .Nk = in.key.size(2), .D = in.query.size(3), .Dv = 0};
    scores.dtype = dtype_of(in.query, "query");
    scores.query = read(in.query, "query", {n.B, H, n.Nq, n.D});
    scores.key = read_like_query(in.key, "key", {n.B, Hkv, n.Nk, n.D});
    STD_TORCH_CHECK(in.mask.has_value() == in.alpha.has_value(), "alpha: expected one exactly when there is a mask");
    if (in.mask.has_value()) read_mask(*in.mask, in.mask_is_logits, *in.alpha);
    if (in.padding.has_value()) read_padding(*in.padding);
    scores.scale = in.scale;
  }

  // Adds value to the sizes of the scores.
  Tensor4 read_value(const Tensor& value) {
    STD_TORCH_CHECK(value.dim() == 4, "value: expected 4 dimensions, got ", value.dim());
    scores.size.Dv = value.size(3);
    return read_like_query(value, "value", {scores.size.B, scores.size.Hkv, scores.size.Nk, scores.size.Dv});
  }

  // A strided tensor to read. An axis of size 1 has stride 0, so that a mask is broadcast over it; but the last one is never 0, so that
  // rows of one element count as contiguous.
  Tensor4 read(const Tensor& t, const char* name, Shape sizes) const {
    check_sizes(t, name, sizes);
    return strided(t, name, 0);
  }
  Tensor4 read_like_query(const Tensor& t, const char* name, Shape sizes) const {
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected query's dtype");
    return read(t, name, sizes);
  }
  Tensor4 read_accumulated(const Tensor& t, const char* name, Shape sizes) const {
    STD_TORCH_CHECK(t.scalar_type() == acc, name, ": expected the accumulation dtype");
    return read(t, name, sizes);
  }

  // A contiguous tensor to read or to write; null when there is none.
  const void* contiguous(const Optional& t, const char* name, ScalarType expected, Shape sizes) const {
    if (!t.has_value()) return nullptr;
    check_sizes(*t, name, sizes);
    STD_TORCH_CHECK(t->scalar_type() == expected && t->is_contiguous(), name, ": expected a contiguous tensor of the dtype of its place");
    return t->const_data_ptr();
  }
  void* output(const Optional& t, const char* name, ScalarType expected, Shape sizes) const {
    if (contiguous(t, name, expected, sizes) == nullptr) return nullptr;
    if (t->is_cpu()) prefer_huge_pages(t->mutable_data_ptr(), t->numel() * static_cast<int64_t>(t->element_size()));
    return t->mutable_data_ptr();
  }

  // What forward left of each row's softmax, of which backward reads one.
  template <class Params>
  void rows(const Optional& lse, const Optional& normalizer, Params& params) const {
    STD_TORCH_CHECK(lse.has_value() || normalizer.has_value(), "lse: expected where there is no normalizer");
    params.lse = contiguous(lse, "lse", acc, {scores.size.B, scores.size.H, scores.size.Nq});
    params.normalizer = this->normalizer(normalizer);
  }
  const void* normalizer(const Optional& t) const {
    STD_TORCH_CHECK(!t.has_value() || dtype == acc, "normalizer: expected with float32 or float64 alone");
    return contiguous(t, "normalizer", acc, {scores.size.B, scores.size.H, scores.size.Nq, 2});
  }
  void* normalizer_output(const Optional& t) const { return normalizer(t) == nullptr ? nullptr : t->mutable_data_ptr(); }

  template <class Params>
  void outputs(const Gradients& to, Params& params) const {
    const auto& [B, H, Hkv, Nq, Nk, D, Dv] = scores.size;
    const int64_t* m = scores.mask_size;
    STD_TORCH_CHECK(mask_.has_value() || (!to.dmask.has_value() && !to.dalpha.has_value()), "dmask, dalpha: expected none without a mask");
    params.dquery = output(to.dquery, "dquery", dtype, {B, H, Nq, D});
    params.dkey = output(to.dkey, "dkey", dtype, {B, Hkv, Nk, D});
    const int64_t* batch = scores.mask_batch.size;
    params.dmask = output(to.dmask, "dmask", mask_.has_value() ? mask_->scalar_type() : acc, {batch[0], batch[1], m[1], m[2], Nk});
    params.dalpha = output(to.dalpha, "dalpha", acc, {H});
  }

  // The seed's one element, wherever it lies; null without dropout.
  const int64_t* seed(const Optional& seed, double p) const {
    STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p: expected 0 <= p < 1, got ", p);
    STD_TORCH_CHECK(seed.has_value() || p == 0.0, "seed: expected one with dropout_p = ", p);
    if (!seed.has_value()) return nullptr;
    STD_TORCH_CHECK(seed->device() == query_.device() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                    "seed: expected one int64 element on query's device");
    return static_cast<const int64_t*>(seed->const_data_ptr());
  }

 private:
  // The four axes from `first` on.
  static Tensor4 strided(const Tensor& t, const char* name, int first) {
    Tensor4 r{.data = t.const_data_ptr(), .dtype = dtype_of(t, name)};
    for (int axis = 0; axis < 4; ++axis) r.stride[axis] = t.size(first + axis) == 1 ? 0 : t.stride(first + axis);
    if (t.size(first + 3) == 1) r.stride[3] = 1;
    return r;
  }

  void check_sizes(const Tensor& t, const char* name, Shape sizes) const {
    STD_TORCH_CHECK(t.device() == query_.device(), name, ": expected a tensor on query's device");
    STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(), " dimensions, got ", t.dim());
    int64_t axis = 0;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(t.size(axis) == size, name, ": expected size ", size, " on axis ", axis, ", got ", t.size(axis));
      ++axis;
    }
  }

  void read_mask(const Tensor& mask, bool is_logits, const Tensor& alpha) {
    const Sizes& n = scores.size;
    STD_TORCH_CHECK(mask.dim() == 5, "mask: expected 5 dimensions, got ", mask.dim());
    const int64_t outer = mask.size(0), inner = mask.size(1), h = mask.size(2), i = mask.size(3), masks = outer * inner;
    const bool fits_batch = masks == n.B || (masks > 0 && n.B % masks == 0 && (outer == 1 || inner == 1));
    STD_TORCH_CHECK(fits_batch && (h == 1 || h == n.H) && (i == 1 || i == n.Nq), "mask: expected size 1 or query's, got ", outer, ", ",
                    inner, ", ", h, ", ", i);
    check_sizes(mask, "mask", {outer, inner, h, i, n.Nk});
    scores.mask = strided(mask, "mask", 1);
    scores.mask.stride[0] = 0;
    scores.mask_batch.inner = inner > 1 ? inner : outer > 1 ? n.B / outer : 1;
    for (int axis = 0; axis < 2; ++axis) {
      scores.mask_batch.size[axis] = mask.size(axis);
      scores.mask_batch.stride[axis] = mask.size(axis) == 1 ? 0 : mask.stride(axis);
    }
    scores.mask_is_logits = is_logits;
    scores.mask_size[0] = masks, scores.mask_size[1] = h, scores.mask_size[2] = i;
    check_sizes(alpha, "alpha", {n.H});
    STD_TORCH_CHECK(alpha.scalar_type() == acc, "alpha: expected the accumulation dtype");
    scores.alpha = alpha.const_data_ptr();
    scores.alpha_stride = alpha.stride(0);
  }

  void read_padding(const Tensor& padding) {
    check_sizes(padding, "key_padding_mask", {scores.size.B, scores.size.Nk});
    STD_TORCH_CHECK(padding.scalar_type() == ScalarType::Bool, "key_padding_mask: expected bool");
    scores.padding = static_cast<const bool*>(padding.const_data_ptr());
    scores.padding_stride[0] = padding.stride(0), scores.padding_stride[1] = padding.stride(1);
  }

  const Tensor& query_;
  const Optional& mask_;
};

// Of the params, all but the seed of dropout, which each library reads in its own way.

inline ForwardParams forward_params(Reader& in, const Tensor& value, double dropout_p, const Tensor& out, const Tensor& lse,
                                    const Optional& remainder, const Optional& mbar, const Optional& normalizer) {
  ForwardParams f{};
  f.value = in.read_value(value);
  f.scores = in.scores;
  f.dropout.p = dropout_p;
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = f.scores.size;
  f.out = in.output(out, "out", in.dtype, {B, H, Nq, Dv});
  f.lse = in.output(lse, "lse", in.acc, {B, H, Nq});
  f.remainder = in.output(remainder, "remainder", in.remainder, {B, H, Nq, Dv});
  f.mbar = in.output(mbar, "mbar", in.acc, {B, H, Nq});
  f.normalizer = in.normalizer_output(normalizer);
  return f;
}

// What forward left, and where the gradients of its outputs are.
struct Saved {
  const Tensor& dout;
  const Optional &dlse, &out, &remainder, &lse, &mbar, &normalizer;
};

inline BackwardParams backward_params(Reader& in, const Tensor& value, double dropout_p, const Saved& saved, const Gradients& to,
                                      const Optional& dvalue) {
  BackwardParams g{};
  g.value = in.read_value(value);
  g.scores = in.scores;
  g.dropout.p = dropout_p;
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = g.scores.size;
  g.dout = in.read_like_query(saved.dout, "dout", {B, H, Nq, Dv});
  if (saved.out.has_value() && to.any()) {  // dV alone needs no delta
    g.out = in.contiguous(saved.out, "out", in.dtype, {B, H, Nq, Dv});
    STD_TORCH_CHECK(saved.remainder.has_value() == (in.dtype != in.acc), "remainder: expected exactly with an out of 16 bits");
    g.remainder = in.contiguous(saved.remainder, "remainder", in.remainder, {B, H, Nq, Dv});
  }
  in.rows(saved.lse, saved.normalizer, g);
  g.dlse = in.contiguous(saved.dlse, "dlse", in.acc, {B, H, Nq});
  g.mbar = in.contiguous(saved.mbar, "mbar", in.acc, {B, H, Nq});
  in.outputs(to, g);
  g.dvalue = in.output(dvalue, "dvalue", in.dtype, {B, Hkv, Nk, Dv});
  STD_TORCH_CHECK(saved.mbar.has_value() || !to.dalpha.has_value(), "mbar: expected with dalpha");
  return g;
}

inline MapParams map_params(const Reader& in, const Tensor& head_weights, const Tensor& map, const Tensor& lse,
                            const Optional& normalizer) {
  MapParams f{};
  f.scores = in.scores;
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = f.scores.size;
  f.head_weights = in.contiguous(head_weights, "head_weights", in.acc, {H});
  f.map = in.output(map, "map", in.acc, {B, Nq, Nk});
  f.lse = in.output(lse, "lse", in.acc, {B, H, Nq});
  f.normalizer = in.normalizer_output(normalizer);
  return f;
}

inline MapBackwardParams map_backward_params(const Reader& in, const Tensor& head_weights, const Tensor& dmap, const Optional& lse,
                                             const Optional& normalizer, const Gradients& to, const Optional& dhead_weights) {
  MapBackwardParams g{};
  g.scores = in.scores;
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = g.scores.size;
  g.head_weights = in.contiguous(head_weights, "head_weights", in.acc, {H});
  g.dmap = in.read_accumulated(dmap, "dmap", {B, 1, Nq, Nk});
  in.rows(lse, normalizer, g);
  in.outputs(to, g);
  g.dhead_weights = in.output(dhead_weights, "dhead_weights", in.acc, {H});
  return g;
}

}  // namespace smattn::binding
