// The door from torch to the CUDA kernels: the only file here that includes torch, and of torch only the stable C++ ABI. It fills the
// kernels' plain structs from tensors that smattn/native_cuda.py has allocated. Compiled a second time with SMATTN_EMULATED for
// tests on a machine without a GPU, where the same ops run on the CPU through emulator.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"
#ifdef SMATTN_EMULATED
#include "emulator/emulator.h"
#endif

namespace {

using smattn::DType;
using smattn::Tensor4;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, "expected a tensor of float16, bfloat16, float32 or float64");
  }
}

// Strides of axes of size 1 are 0: mask is broadcast over them.
Tensor4 tensor4(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "expected a tensor of 4 axes, got ", x.dim());
  Tensor4 view{.data = x.const_data_ptr(), .dtype = dtype_of(x)};
  for (int axis = 0; axis < 4; ++axis) view.stride[axis] = x.size(axis) == 1 ? 0 : x.stride(axis);
  if (x.size(3) == 1) view.stride[3] = 1;
  return view;
}

const void* data(const Maybe& x) { return x ? x->const_data_ptr() : nullptr; }
void* result(const Maybe& x) { return x ? x->mutable_data_ptr() : nullptr; }

smattn::Scores scores_of(const Tensor& query, const Tensor& key, int64_t Dv, const Maybe& mask, bool logits, const Maybe& alpha,
                         const Maybe& padding, double scale) {
  smattn::Scores scores{.size = {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), Dv},
                        .dtype = dtype_of(query),
                        .query = tensor4(query),
                        .key = tensor4(key),
                        .mask = mask ? tensor4(*mask) : Tensor4{},
                        .mask_is_logits = logits,
                        .mask_size = {1, 1, 1},
                        .alpha = data(alpha),
                        .alpha_stride = alpha ? alpha->stride(0) : 0,
                        .padding = static_cast<const bool*>(data(padding)),
                        .padding_stride = {padding ? padding->stride(0) : 0, padding ? padding->stride(1) : 0},
                        .scale = scale};
  if (mask)
    for (int axis = 0; axis < 3; ++axis) scores.mask_size[axis] = mask->size(axis);
  return scores;
}

// Scratch memory from torch's allocator; it may be handed out again as soon as it is freed, to work that comes later in the stream.
struct Scratch {
  const Tensor& like;
  std::vector<Tensor> blocks;

  static void* allocate(int64_t bytes, void* self) {
    auto& scratch = *static_cast<Scratch*>(self);
    scratch.blocks.push_back(torch::stable::new_empty(scratch.like, {bytes}, ScalarType::Byte));
    return scratch.blocks.back().mutable_data_ptr();
  }
  smattn::cuda::Context context(int64_t stream, bool allow_tf32, const Maybe& seed) {
    return {static_cast<int>(like.get_device_index()),
            reinterpret_cast<void*>(stream),
            allow_tf32,
            static_cast<const int64_t*>(data(seed)),
            allocate,
            this};
  }
};

// What went wrong, and with which call.
template <class Run>
void say_which(const Tensor& query, const Tensor& key, const Run& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    const auto shape = [](const Tensor& x) {
      std::string text;
      for (int axis = 0; axis < 4; ++axis) text += (axis == 0 ? "(" : ", ") + std::to_string(x.size(axis));
      return text + ")";
    };
    throw std::runtime_error(std::string(error.what()) + "; query " + shape(query) + ", key " + shape(key));
  }
}

void forward(Tensor query, Tensor key, Tensor value, Maybe mask, bool logits, Maybe alpha, Maybe padding, Maybe seed, double scale,
             double dropout_p, bool allow_tf32, int64_t stream, Tensor out, Tensor lse, Maybe out_acc, Maybe mbar) {
  Scratch scratch{query, {}};
  const auto context = scratch.context(stream, allow_tf32, seed);
  say_which(query, key, [&] {
    smattn::cuda::forward({.scores = scores_of(query, key, value.size(3), mask, logits, alpha, padding, scale),
                           .value = tensor4(value),
                           .dropout = {.p = dropout_p},
                           .out = out.mutable_data_ptr(),
                           .lse = lse.mutable_data_ptr(),
                           .out_acc = result(out_acc),
                           .mbar = result(mbar)},
                          context);
  });
}

void backward(Tensor dout, Maybe dlse, Tensor query, Tensor key, Tensor value, Maybe mask, bool logits, Maybe alpha, Maybe padding,
              Maybe seed, Maybe out, Tensor lse, Maybe mbar, double scale, double dropout_p, bool allow_tf32, int64_t stream, Maybe dquery,
              Maybe dkey, Maybe dvalue, Maybe dmask, Maybe dalpha) {
  Scratch scratch{query, {}};
  const auto context = scratch.context(stream, allow_tf32, seed);
  say_which(query, key, [&] {
    smattn::cuda::backward({.scores = scores_of(query, key, value.size(3), mask, logits, alpha, padding, scale),
                            .value = tensor4(value),
                            .dropout = {.p = dropout_p},
                            .dout = tensor4(dout),
                            .out = out ? tensor4(*out) : Tensor4{},
                            .lse = lse.const_data_ptr(),
                            .dlse = data(dlse),
                            .mbar = data(mbar),
                            .dquery = result(dquery),
                            .dkey = result(dkey),
                            .dvalue = result(dvalue),
                            .dmask = result(dmask),
                            .dalpha = result(dalpha)},
                           context);
  });
}

void attention_map(Tensor query, Tensor key, Maybe mask, bool logits, Maybe alpha, Tensor head_weights, Maybe padding, double scale,
                   bool allow_tf32, int64_t stream, Tensor map, Tensor lse) {
  Scratch scratch{query, {}};
  const auto context = scratch.context(stream, allow_tf32, {});
  say_which(query, key, [&] {
    smattn::cuda::attention_map({.scores = scores_of(query, key, query.size(3), mask, logits, alpha, padding, scale),
                                 .head_weights = head_weights.const_data_ptr(),
                                 .map = map.mutable_data_ptr(),
                                 .lse = lse.mutable_data_ptr()},
                                context);
  });
}

void attention_map_backward(Tensor dmap, Tensor query, Tensor key, Maybe mask, bool logits, Maybe alpha, Tensor head_weights, Maybe padding,
                            Tensor lse, double scale, bool allow_tf32, int64_t stream, Maybe dquery, Maybe dkey, Maybe dmask, Maybe dalpha,
                            Maybe dhead_weights) {
  Scratch scratch{query, {}};
  const auto context = scratch.context(stream, allow_tf32, {});
  say_which(query, key, [&] {
    smattn::cuda::attention_map_backward({.scores = scores_of(query, key, query.size(3), mask, logits, alpha, padding, scale),
                                          .head_weights = head_weights.const_data_ptr(),
                                          .dmap = tensor4(dmap),
                                          .lse = lse.const_data_ptr(),
                                          .dquery = result(dquery),
                                          .dkey = result(dkey),
                                          .dmask = result(dmask),
                                          .dalpha = result(dalpha),
                                          .dhead_weights = result(dhead_weights)},
                                         context);
  });
}

}  // namespace

#ifdef SMATTN_EMULATED
namespace {
void run_kernels(bool on) { smattn::cuda::emulator::runs = on; }
}  // namespace
#define SMATTN_NAMESPACE smattn_cuda_emulated
#define SMATTN_DEVICE_KEY CPU
#else
#define SMATTN_NAMESPACE smattn_cuda
#define SMATTN_DEVICE_KEY CUDA
#endif
#define SMATTN_LIBRARY(ns, library) STABLE_TORCH_LIBRARY(ns, library)
#define SMATTN_LIBRARY_IMPL(ns, key, library) STABLE_TORCH_LIBRARY_IMPL(ns, key, library)

SMATTN_LIBRARY(SMATTN_NAMESPACE, library) {
  library.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? mask, bool mask_is_logits, Tensor? alpha, Tensor? padding, Tensor? seed, "
      "float scale, float dropout_p, bool allow_tf32, int stream, Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? out_acc, Tensor(d!)? mbar) "
      "-> ()");
  library.def(
      "backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor? mask, bool mask_is_logits, Tensor? alpha, "
      "Tensor? padding, Tensor? seed, Tensor? out, Tensor lse, Tensor? mbar, float scale, float dropout_p, bool allow_tf32, int stream, "
      "Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dvalue, Tensor(d!)? dmask, Tensor(e!)? dalpha) -> ()");
  library.def(
      "attention_map(Tensor query, Tensor key, Tensor? mask, bool mask_is_logits, Tensor? alpha, Tensor head_weights, Tensor? padding, "
      "float scale, bool allow_tf32, int stream, Tensor(a!) map, Tensor(b!) lse) -> ()");
  library.def(
      "attention_map_backward(Tensor dmap, Tensor query, Tensor key, Tensor? mask, bool mask_is_logits, Tensor? alpha, Tensor "
      "head_weights, "
      "Tensor? padding, Tensor lse, float scale, bool allow_tf32, int stream, Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dmask, "
      "Tensor(d!)? dalpha, Tensor(e!)? dhead_weights) -> ()");
}

SMATTN_LIBRARY_IMPL(SMATTN_NAMESPACE, SMATTN_DEVICE_KEY, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("attention_map", TORCH_BOX(&attention_map));
  library.impl("attention_map_backward", TORCH_BOX(&attention_map_backward));
}

#ifdef SMATTN_EMULATED
STABLE_TORCH_LIBRARY_FRAGMENT(smattn_cuda_emulated, library) { library.def("run_kernels(bool on) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(smattn_cuda_emulated, CompositeExplicitAutograd, library) {
  library.impl("run_kernels", TORCH_BOX(&run_kernels));
}
#endif
