// The only file that includes torch, and of torch only the stable C++ ABI: it checks what it is handed, fills the kernels' plain
// structs, and registers the raw ops torch.ops.smattn_native.*.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/dropout_bits.h"
#include "parallel.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's own threads, so that torch.set_num_threads rules here too.
void torch_threads(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, items, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

// dropout_keep: seed int64 (1,) on the CPU -> bool (B, H, Nq, Nk), true where the element is kept.
Tensor dropout_keep(const Tensor& seed, int64_t B, int64_t H, int64_t Nq, int64_t Nk, double p) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed: expected one int64 element");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "p: expected 0 <= p < 1, got ", p);
  STD_TORCH_CHECK(B >= 0 && H >= 0 && Nq >= 0 && Nk >= 0, "sizes: expected none below 0, got ", B, ", ", H, ", ", Nq, ", ", Nk);
  Tensor keep = torch::stable::empty({B, H, Nq, Nk}, ScalarType::Bool);
  smattn::dropout_bits({.keep = static_cast<bool*>(keep.mutable_data_ptr()),
                        .rows = B * H * Nq,
                        .Nq = Nq,
                        .Nk = Nk,
                        .seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())),
                        .p = p},
                       torch_threads);
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY(smattn_native, library) {
  library.def("dropout_keep(Tensor seed, int B, int H, int Nq, int Nk, float p) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smattn_native, CPU, library) { library.impl("dropout_keep", TORCH_BOX(&dropout_keep)); }
