// The door from torch to the CPU kernels: the raw ops torch.ops.smattn_cpu.*, which write into tensors that smattn/cpu.py made.
#include "binding.h"

#include <string>

#include "cpu/dispatch.h"
#include "cpu/dropout_bits.h"
#include "parallel.h"

namespace {

using namespace smattn::binding;
using smattn::DType;

// torch's own threads, so that torch.set_num_threads rules here too.
smattn::ParallelFor torch_threads() {
  return {torch::stable::get_num_threads(), [](int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(0, items, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

uint64_t value_of(const int64_t* seed) { return seed == nullptr ? 0 : static_cast<uint64_t>(*seed); }

void forward(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask, bool mask_is_logits, const Optional& alpha,
             const Optional& padding, const Optional& seed, double scale, double dropout_p, const Tensor& out, const Tensor& lse,
             const Optional& remainder, const Optional& mbar, const Optional& normalizer) {
  Reader in({query, key, mask, mask_is_logits, alpha, padding, scale});
  smattn::ForwardParams params = forward_params(in, value, dropout_p, out, lse, remainder, mbar, normalizer);
  params.dropout.seed = value_of(in.seed(seed, dropout_p));
  smattn::cpu::selected().forward(params, torch_threads());
}

void backward(const Tensor& dout, const Optional& dlse, const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask,
              bool mask_is_logits, const Optional& alpha, const Optional& padding, const Optional& seed, const Optional& out,
              const Optional& remainder, const Optional& lse, const Optional& mbar, const Optional& normalizer, double scale,
              double dropout_p, const Optional& dquery, const Optional& dkey, const Optional& dvalue, const Optional& dmask,
              const Optional& dalpha) {
  Reader in({query, key, mask, mask_is_logits, alpha, padding, scale});
  const Saved saved{dout, dlse, out, remainder, lse, mbar, normalizer};
  smattn::BackwardParams params = backward_params(in, value, dropout_p, saved, {dquery, dkey, dmask, dalpha}, dvalue);
  params.dropout.seed = value_of(in.seed(seed, dropout_p));
  smattn::cpu::selected().backward(params, torch_threads());
}

void attention_map(const Tensor& query, const Tensor& key, const Optional& mask, bool mask_is_logits, const Optional& alpha,
                   const Tensor& head_weights, const Optional& padding, double scale, const Tensor& map, const Tensor& lse,
                   const Optional& normalizer) {
  const Reader in({query, key, mask, mask_is_logits, alpha, padding, scale});
  smattn::cpu::selected().attention_map(map_params(in, head_weights, map, lse, normalizer), torch_threads());
}

void attention_map_backward(const Tensor& dmap, const Tensor& query, const Tensor& key, const Optional& mask, bool mask_is_logits,
                            const Optional& alpha, const Tensor& head_weights, const Optional& padding, const Optional& lse,
                            const Optional& normalizer, double scale, const Optional& dquery, const Optional& dkey, const Optional& dmask,
                            const Optional& dalpha, const Optional& dhead_weights) {
  const Reader in({query, key, mask, mask_is_logits, alpha, padding, scale});
  const Gradients to{dquery, dkey, dmask, dalpha};
  smattn::cpu::selected().attention_map_backward(map_backward_params(in, head_weights, dmap, lse, normalizer, to, dhead_weights),
                                                 torch_threads());
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

// Which of them runs unless another is selected, and why.
std::string cpu_kernels_reason() { return smattn::cpu::why_first(); }

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

// tile_product: float32 (16, 16) sum += bfloat16 (16, 32) a times b, given as (16, 16, 2), by a matrix tile or its double in software;
// False where this machine cannot.
bool tile_product(const Tensor& a, const Tensor& b, const Tensor& sum, bool in_software) {
  STD_TORCH_CHECK(dtype_of(a, "a") == DType::kBFloat16 && dtype_of(b, "b") == DType::kBFloat16, "a, b: expected bfloat16");
  STD_TORCH_CHECK(dtype_of(sum, "sum") == DType::kFloat32, "sum: expected float32");
  STD_TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && sum.is_contiguous(), "a, b, sum: expected contiguous");
  STD_TORCH_CHECK(a.numel() == 512 && b.numel() == 512 && sum.numel() == 256, "a, b, sum: expected 512, 512 and 256 elements");
  return smattn::cpu::multiply_tile(in_software, static_cast<const uint16_t*>(a.const_data_ptr()),
                                    static_cast<const uint16_t*>(b.const_data_ptr()), static_cast<float*>(sum.mutable_data_ptr()));
}

// dropout_keep: seed int64 (1,) on the CPU -> bool (B, H, Nq, Nk), true where the element is kept.
Tensor dropout_keep(const Tensor& seed, int64_t B, int64_t H, int64_t Nq, int64_t Nk, double p) {
  STD_TORCH_CHECK(B >= 0 && H >= 0 && Nq >= 0 && Nk >= 0, "sizes: expected none below 0, got ", B, ", ", H, ", ", Nq, ", ", Nk);
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p: expected 0 <= p < 1, got ", p);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed: expected one int64 element");
  Tensor keep = torch::stable::empty({B, H, Nq, Nk}, ScalarType::Bool);
  smattn::dropout_bits({.keep = static_cast<bool*>(keep.mutable_data_ptr()),
                        .rows = B * H * Nq,
                        .Nq = Nq,
                        .Nk = Nk,
                        .seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())),
                        .p = p},
                       torch_threads());
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY(smattn_cpu, library) {
  library.def(SMATTN_FORWARD(""));
  library.def(SMATTN_BACKWARD(""));
  library.def(SMATTN_ATTENTION_MAP(""));
  library.def(SMATTN_ATTENTION_MAP_BACKWARD(""));
  library.def("built_with_torch() -> str");
  library.def("cpu_kernels() -> str");
  library.def("cpu_kernels_reason() -> str");
  library.def("select_cpu_kernels(str name) -> ()");
  library.def("exp2(Tensor x, Tensor(a!) y) -> ()");
  library.def("tile_product(Tensor a, Tensor b, Tensor(a!) sum, bool in_software) -> bool");
  library.def("dropout_keep(Tensor seed, int B, int H, int Nq, int Nk, float p) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smattn_cpu, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("attention_map", TORCH_BOX(&attention_map));
  library.impl("attention_map_backward", TORCH_BOX(&attention_map_backward));
  library.impl("exp2", TORCH_BOX(&exp2_of));
  library.impl("tile_product", TORCH_BOX(&tile_product));
  library.impl("dropout_keep", TORCH_BOX(&dropout_keep));
}

STABLE_TORCH_LIBRARY_IMPL(smattn_cpu, CompositeExplicitAutograd, library) {
  library.impl("built_with_torch", TORCH_BOX(&built_with_torch));
  library.impl("cpu_kernels", TORCH_BOX(&cpu_kernels));
  library.impl("cpu_kernels_reason", TORCH_BOX(&cpu_kernels_reason));
  library.impl("select_cpu_kernels", TORCH_BOX(&select_cpu_kernels));
}
