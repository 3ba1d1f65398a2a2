// The door from torch to the CPU kernels. Of torch it includes the stable C++ ABI only. It checks what it is handed, fills the kernels' plain
// structs, and registers the raw ops torch.ops.smattn_cpu.*, which write into tensors that smattn/native.py made.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/dropout_bits.h"
#include "memory.h"
#include "parallel.h"
#include "params.h"

namespace {

using smattn::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// torch's own threads, so that torch.set_num_threads rules here too.
void torch_threads(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, items, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

DType dtype_of(const Tensor& t, const char* name) {
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

ScalarType accumulator_of(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_sizes(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a tensor on the CPU");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(), " dimensions, got ", t.dim());
  int64_t axis = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(t.size(axis) == size, name, ": expected size ", size, " on axis ", axis, ", got ", t.size(axis));
    ++axis;
  }
}

smattn::Tensor4 read(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  check_sizes(t, name, sizes);
  smattn::Tensor4 r{t.const_data_ptr(), dtype_of(t, name), {}};
  for (int axis = 0; axis < 4; ++axis) r.stride[axis] = t.size(axis) == 1 ? 0 : t.stride(axis);
  if (t.size(3) == 1) r.stride[3] = 1;
  return r;
}

// A contiguous tensor to read or to write; null when there is none.
const void* contiguous(const Optional& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  if (!t.has_value()) return nullptr;
  check_sizes(*t, name, sizes);
  STD_TORCH_CHECK(t->scalar_type() == dtype && t->is_contiguous(), name, ": expected a contiguous tensor of the dtype of its place");
  return t->const_data_ptr();
}

void* output(const Optional& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  if (contiguous(t, name, dtype, sizes) == nullptr) return nullptr;
  smattn::prefer_huge_pages(t->mutable_data_ptr(), t->numel() * static_cast<int64_t>(t->element_size()));
  return t->mutable_data_ptr();
}

smattn::Scores scores(const Tensor& query, const Tensor& key, const Optional& mask, bool mask_is_logits, const Optional& alpha,
                      const Optional& padding, double scale) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query, key: expected 4 dimensions, got ", query.dim(), " and ", key.dim());
  smattn::Scores s{};
  const int64_t B = query.size(0), H = query.size(1), Hkv = key.size(1), Nq = query.size(2), Nk = key.size(2), D = query.size(3);
  STD_TORCH_CHECK(Hkv > 0 && H % Hkv == 0, "key: expected a number of heads that divides query's ", H, ", got ", Hkv);
  s.size = {.B = B, .H = H, .Hkv = Hkv, .Nq = Nq, .Nk = Nk, .D = D, .Dv = 0};
  s.dtype = dtype_of(query, "query");
  s.query = read(query, "query", {B, H, Nq, D});
  s.key = read(key, "key", {B, Hkv, Nk, D});
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type(), "key: expected query's dtype");
  STD_TORCH_CHECK(mask.has_value() == alpha.has_value(), "alpha: expected one exactly when there is a mask");
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->dim() == 4, "mask: expected 4 dimensions, got ", mask->dim());
    const int64_t b = mask->size(0), h = mask->size(1), i = mask->size(2);
    STD_TORCH_CHECK((b == 1 || b == B) && (h == 1 || h == H) && (i == 1 || i == Nq), "mask: expected size 1 or query's, got ", b, ", ", h,
                    ", ", i);
    s.mask = read(*mask, "mask", {b, h, i, Nk});
    s.mask_is_logits = mask_is_logits;
    s.mask_size[0] = b, s.mask_size[1] = h, s.mask_size[2] = i;
    check_sizes(*alpha, "alpha", {H});
    STD_TORCH_CHECK(alpha->scalar_type() == accumulator_of(query), "alpha: expected the accumulation dtype");
    s.alpha = alpha->const_data_ptr();
    s.alpha_stride = alpha->stride(0);
  }
  if (padding.has_value()) {
    check_sizes(*padding, "key_padding_mask", {B, Nk});
    STD_TORCH_CHECK(padding->scalar_type() == ScalarType::Bool, "key_padding_mask: expected bool");
    s.padding = static_cast<const bool*>(padding->const_data_ptr());
    s.padding_stride[0] = padding->stride(0), s.padding_stride[1] = padding->stride(1);
  }
  s.scale = scale;
  return s;
}

// Adds value to the sizes of the scores.
smattn::Tensor4 read_value(const Tensor& value, const Tensor& query, smattn::Scores& s) {
  STD_TORCH_CHECK(value.dim() == 4, "value: expected 4 dimensions, got ", value.dim());
  STD_TORCH_CHECK(value.scalar_type() == query.scalar_type(), "value: expected query's dtype");
  s.size.Dv = value.size(3);
  return read(value, "value", {s.size.B, s.size.Hkv, s.size.Nk, s.size.Dv});
}

smattn::Dropout dropout(const Optional& seed, double p) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p: expected 0 <= p < 1, got ", p);
  if (!seed.has_value()) {
    STD_TORCH_CHECK(p == 0.0, "seed: expected one with dropout_p = ", p);
    return {};
  }
  STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed: expected one int64 element on the CPU");
  return {p, static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()))};
}

void forward(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask, bool mask_is_logits, const Optional& alpha,
             const Optional& padding, const Optional& seed, double scale, double p, const Tensor& out, const Tensor& lse,
             const Optional& out_acc, const Optional& mbar) {
  smattn::ForwardParams f{};
  f.scores = scores(query, key, mask, mask_is_logits, alpha, padding, scale);
  f.value = read_value(value, query, f.scores);
  f.dropout = dropout(seed, p);
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = f.scores.size;
  const ScalarType acc = accumulator_of(query);
  f.out = output(out, "out", query.scalar_type(), {B, H, Nq, Dv});
  f.lse = output(lse, "lse", acc, {B, H, Nq});
  f.out_acc = output(out_acc, "out_acc", acc, {B, H, Nq, Dv});
  f.mbar = output(mbar, "mbar", acc, {B, H, Nq});
  smattn::cpu::selected().forward(f, torch_threads);
}

void backward(const Tensor& dout, const Optional& dlse, const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask,
              bool mask_is_logits, const Optional& alpha, const Optional& padding, const Optional& seed, const Optional& out,
              const Tensor& lse, const Optional& mbar, double scale, double p, const Optional& dquery, const Optional& dkey,
              const Optional& dvalue, const Optional& dmask, const Optional& dalpha) {
  smattn::BackwardParams g{};
  g.scores = scores(query, key, mask, mask_is_logits, alpha, padding, scale);
  g.value = read_value(value, query, g.scores);
  g.dropout = dropout(seed, p);
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = g.scores.size;
  const ScalarType acc = accumulator_of(query), dtype = query.scalar_type();
  g.dout = read(dout, "dout", {B, H, Nq, Dv});
  if (out.has_value()) g.out = read(*out, "out", {B, H, Nq, Dv});
  g.lse = contiguous(lse, "lse", acc, {B, H, Nq});
  g.dlse = contiguous(dlse, "dlse", acc, {B, H, Nq});
  g.mbar = contiguous(mbar, "mbar", acc, {B, H, Nq});
  g.dquery = output(dquery, "dquery", dtype, {B, H, Nq, D});
  g.dkey = output(dkey, "dkey", dtype, {B, Hkv, Nk, D});
  g.dvalue = output(dvalue, "dvalue", dtype, {B, Hkv, Nk, Dv});
  STD_TORCH_CHECK(mask.has_value() || (!dmask.has_value() && !dalpha.has_value()), "dmask, dalpha: expected none without a mask");
  STD_TORCH_CHECK(mbar.has_value() || !dalpha.has_value(), "mbar: expected with dalpha");
  const int64_t* m = g.scores.mask_size;
  g.dmask = output(dmask, "dmask", mask.has_value() ? mask->scalar_type() : acc, {m[0], m[1], m[2], Nk});
  g.dalpha = output(dalpha, "dalpha", acc, {H});
  smattn::cpu::selected().backward(g, torch_threads);
}

void attention_map(const Tensor& query, const Tensor& key, const Optional& mask, bool mask_is_logits, const Optional& alpha,
                   const Tensor& head_weights, const Optional& padding, double scale, const Tensor& map, const Tensor& lse) {
  smattn::MapParams f{};
  f.scores = scores(query, key, mask, mask_is_logits, alpha, padding, scale);
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = f.scores.size;
  const ScalarType acc = accumulator_of(query);
  f.head_weights = contiguous(head_weights, "head_weights", acc, {H});
  f.map = output(map, "map", acc, {B, Nq, Nk});
  f.lse = output(lse, "lse", acc, {B, H, Nq});
  smattn::cpu::selected().attention_map(f, torch_threads);
}

void attention_map_backward(const Tensor& dmap, const Tensor& query, const Tensor& key, const Optional& mask, bool mask_is_logits,
                            const Optional& alpha, const Tensor& head_weights, const Optional& padding, const Tensor& lse, double scale,
                            const Optional& dquery, const Optional& dkey, const Optional& dmask, const Optional& dalpha,
                            const Optional& dhead_weights) {
  smattn::MapBackwardParams g{};
  g.scores = scores(query, key, mask, mask_is_logits, alpha, padding, scale);
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = g.scores.size;
  const ScalarType acc = accumulator_of(query), dtype = query.scalar_type();
  g.head_weights = contiguous(head_weights, "head_weights", acc, {H});
  STD_TORCH_CHECK(dmap.scalar_type() == acc, "dmap: expected the accumulation dtype");
  g.dmap = read(dmap, "dmap", {B, 1, Nq, Nk});
  g.lse = contiguous(lse, "lse", acc, {B, H, Nq});
  g.dquery = output(dquery, "dquery", dtype, {B, H, Nq, D});
  g.dkey = output(dkey, "dkey", dtype, {B, Hkv, Nk, D});
  STD_TORCH_CHECK(mask.has_value() || (!dmask.has_value() && !dalpha.has_value()), "dmask, dalpha: expected none without a mask");
  const int64_t* m = g.scores.mask_size;
  g.dmask = output(dmask, "dmask", mask.has_value() ? mask->scalar_type() : acc, {m[0], m[1], m[2], Nk});
  g.dalpha = output(dalpha, "dalpha", acc, {H});
  g.dhead_weights = output(dhead_weights, "dhead_weights", acc, {H});
  smattn::cpu::selected().attention_map_backward(g, torch_threads);
}

// The instruction sets whose kernels this machine runs, the fastest first, separated by spaces.
std::string cpu_kernels() {
  std::string names;
  for (const smattn::cpu::Kernels* kernels : smattn::cpu::available()) {
    if (!names.empty()) names += ' ';
    names += kernels->name;
  }
  return names;
}

// The version of the torch whose headers this was built with; any from 2.11 on may load it.
std::string built_with_torch() { return SMATTN_TORCH; }

void select_cpu_kernels(const std::string& name) {
  STD_TORCH_CHECK(smattn::cpu::select(name.c_str()), "name: expected one of ", cpu_kernels(), ", got ", name);
}

// exp2: the kernels' own 2^x of a contiguous float32 or float64 tensor.
void exp2_of(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && x.numel() == y.numel(), "x, y: expected contiguous, alike");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "y: expected x's dtype");
  if (dtype_of(x, "x") == DType::kFloat64) {
    smattn::cpu::selected().exp2_double(static_cast<const double*>(x.const_data_ptr()), static_cast<double*>(y.mutable_data_ptr()),
                                        x.numel());
  } else {
    STD_TORCH_CHECK(dtype_of(x, "x") == DType::kFloat32, "x: expected float32 or float64");
    smattn::cpu::selected().exp2_float(static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()), x.numel());
  }
}

// dropout_keep: seed int64 (1,) on the CPU -> bool (B, H, Nq, Nk), true where the element is kept.
Tensor dropout_keep(const Tensor& seed, int64_t B, int64_t H, int64_t Nq, int64_t Nk, double p) {
  STD_TORCH_CHECK(B >= 0 && H >= 0 && Nq >= 0 && Nk >= 0, "sizes: expected none below 0, got ", B, ", ", H, ", ", Nq, ", ", Nk);
  const smattn::Dropout bits = dropout(seed, p);
  Tensor keep = torch::stable::empty({B, H, Nq, Nk}, ScalarType::Bool);
  smattn::dropout_bits(
      {.keep = static_cast<bool*>(keep.mutable_data_ptr()), .rows = B * H * Nq, .Nq = Nq, .Nk = Nk, .seed = bits.seed, .p = bits.p},
      torch_threads);
  return keep;
}

}  // namespace

#define SMATTN_SCORES "Tensor query, Tensor key, "
#define SMATTN_MASK "Tensor? mask, bool mask_is_logits, Tensor? alpha, "

STABLE_TORCH_LIBRARY(smattn_cpu, library) {
  library.def("forward(" SMATTN_SCORES "Tensor value, " SMATTN_MASK
              "Tensor? key_padding_mask, Tensor? seed, float scale, float dropout_p, "
              "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? out_acc, Tensor(d!)? mbar) -> ()");
  library.def("backward(Tensor dout, Tensor? dlse, " SMATTN_SCORES "Tensor value, " SMATTN_MASK
              "Tensor? key_padding_mask, Tensor? seed, Tensor? out, Tensor lse, Tensor? mbar, float scale, float dropout_p, "
              "Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dvalue, Tensor(d!)? dmask, Tensor(e!)? dalpha) -> ()");
  library.def("attention_map(" SMATTN_SCORES SMATTN_MASK
              "Tensor head_weights, Tensor? key_padding_mask, float scale, Tensor(a!) map, Tensor(b!) lse) -> ()");
  library.def("attention_map_backward(Tensor dmap, " SMATTN_SCORES SMATTN_MASK
              "Tensor head_weights, Tensor? key_padding_mask, Tensor lse, float scale, "
              "Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dmask, Tensor(d!)? dalpha, Tensor(e!)? dhead_weights) -> ()");
  library.def("built_with_torch() -> str");
  library.def("cpu_kernels() -> str");
  library.def("select_cpu_kernels(str name) -> ()");
  library.def("exp2(Tensor x, Tensor(a!) y) -> ()");
  library.def("dropout_keep(Tensor seed, int B, int H, int Nq, int Nk, float p) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smattn_cpu, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("attention_map", TORCH_BOX(&attention_map));
  library.impl("attention_map_backward", TORCH_BOX(&attention_map_backward));
  library.impl("exp2", TORCH_BOX(&exp2_of));
  library.impl("dropout_keep", TORCH_BOX(&dropout_keep));
}

STABLE_TORCH_LIBRARY_IMPL(smattn_cpu, CompositeExplicitAutograd, library) {
  library.impl("built_with_torch", TORCH_BOX(&built_with_torch));
  library.impl("cpu_kernels", TORCH_BOX(&cpu_kernels));
  library.impl("select_cpu_kernels", TORCH_BOX(&select_cpu_kernels));
}
