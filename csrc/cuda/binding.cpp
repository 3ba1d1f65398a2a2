// The door from torch to the CUDA kernels: the raw ops torch.ops.smattn_cuda.*, which write into tensors that smattn/cuda.py made.
// Compiled a second time with SMATTN_EMULATED for tests on a machine without a GPU, where the same ops run on the CPU through emulator/.
#include "../binding.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"
#ifdef SMATTN_EMULATED
#include "emulator/emulator.h"
#endif

namespace {

using namespace smattn::binding;

// Scratch memory from torch's allocator; it may be handed out again as soon as it is freed, to work that comes later in the stream.
struct Scratch {
  const Tensor& like;
  std::vector<Tensor> blocks;

  static void* allocate(int64_t bytes, void* self) {
    auto& scratch = *static_cast<Scratch*>(self);
    scratch.blocks.push_back(torch::stable::new_empty(scratch.like, {bytes}, ScalarType::Byte));
    return scratch.blocks.back().mutable_data_ptr();
  }
  smattn::cuda::Context context(int64_t stream, bool allow_tf32, const int64_t* seed) {
    return {static_cast<int>(like.get_device_index()), reinterpret_cast<void*>(stream), allow_tf32, seed, allocate, this};
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

void check_has_scores(const Reader& in) {
  const smattn::Sizes& n = in.scores.size;
  STD_TORCH_CHECK(n.B > 0 && n.Nq > 0 && n.Nk > 0, "query, key: expected a batch, queries and keys, got ", n.B, ", ", n.Nq, " and ", n.Nk);
}

// Of TF32 products P is rebuilt from lse, as of 16 bits, whether or not there is a normalizer.
void check_lse(const Optional& lse, bool allow_tf32) { STD_TORCH_CHECK(lse.has_value() || !allow_tf32, "lse: expected with allow_tf32"); }

void forward(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask, bool mask_is_logits, const Optional& alpha,
             const Optional& padding, const Optional& seed, double scale, double dropout_p, bool allow_tf32, int64_t stream,
             const Tensor& out, const Tensor& lse, const Optional& remainder, const Optional& mbar, const Optional& normalizer) {
  Reader in({query, key, mask, mask_is_logits, alpha, padding, scale});
  const smattn::ForwardParams params = forward_params(in, value, dropout_p, out, lse, remainder, mbar, normalizer);
  check_has_scores(in);
  Scratch scratch{query, {}};
  const auto context = scratch.context(stream, allow_tf32, in.seed(seed, dropout_p));
  say_which(query, key, [&] { smattn::cuda::forward(params, context); });
}

void backward(const Tensor& dout, const Optional& dlse, const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask,
              bool mask_is_logits, const Optional& alpha, const Optional& padding, const Optional& seed, const Optional& out,
              const Optional& remainder, const Optional& lse, const Optional& mbar, const Optional& normalizer, double scale,
              double dropout_p, bool allow_tf32, int64_t stream, const Optional& dquery, const Optional& dkey, const Optional& dvalue,
              const Optional& dmask, const Optional& dalpha) {
  Reader in({query, key, mask, mask_is_logits, alpha, padding, scale});
  const Saved saved{dout, dlse, out, remainder, lse, mbar, normalizer};
  const smattn::BackwardParams params = backward_params(in, value, dropout_p, saved, {dquery, dkey, dmask, dalpha}, dvalue);
  check_lse(lse, allow_tf32);
  check_has_scores(in);
  Scratch scratch{query, {}};
  const auto context = scratch.context(stream, allow_tf32, in.seed(seed, dropout_p));
  say_which(query, key, [&] { smattn::cuda::backward(params, context); });
}

void attention_map(const Tensor& query, const Tensor& key, const Optional& mask, bool mask_is_logits, const Optional& alpha,
                   const Tensor& head_weights, const Optional& padding, double scale, bool allow_tf32, int64_t stream, const Tensor& map,
                   const Tensor& lse, const Optional& normalizer) {
  const Reader in({query, key, mask, mask_is_logits, alpha, padding, scale});
  const smattn::MapParams params = map_params(in, head_weights, map, lse, normalizer);
  check_has_scores(in);
  Scratch scratch{query, {}};
  const auto context = scratch.context(stream, allow_tf32, nullptr);
  say_which(query, key, [&] { smattn::cuda::attention_map(params, context); });
}

void attention_map_backward(const Tensor& dmap, const Tensor& query, const Tensor& key, const Optional& mask, bool mask_is_logits,
                            const Optional& alpha, const Tensor& head_weights, const Optional& padding, const Optional& lse,
                            const Optional& normalizer, double scale, bool allow_tf32, int64_t stream, const Optional& dquery,
                            const Optional& dkey, const Optional& dmask, const Optional& dalpha, const Optional& dhead_weights) {
  const Reader in({query, key, mask, mask_is_logits, alpha, padding, scale});
  const Gradients to{dquery, dkey, dmask, dalpha};
  const smattn::MapBackwardParams params = map_backward_params(in, head_weights, dmap, lse, normalizer, to, dhead_weights);
  check_lse(lse, allow_tf32);
  check_has_scores(in);
  Scratch scratch{query, {}};
  const auto context = scratch.context(stream, allow_tf32, nullptr);
  say_which(query, key, [&] { smattn::cuda::attention_map_backward(params, context); });
}

}  // namespace

#ifdef SMATTN_EMULATED
namespace {
void run_kernels(bool on) { smattn::cuda::emulator::runs = on; }
// interpreter: its address, 0 for none
void run_kernels_by(int64_t interpreter) {
  smattn::cuda::emulator::interpreter = reinterpret_cast<smattn::cuda::emulator::Interpreter>(interpreter);
}
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
  library.def(SMATTN_FORWARD("bool allow_tf32, int stream, "));
  library.def(SMATTN_BACKWARD("bool allow_tf32, int stream, "));
  library.def(SMATTN_ATTENTION_MAP("bool allow_tf32, int stream, "));
  library.def(SMATTN_ATTENTION_MAP_BACKWARD("bool allow_tf32, int stream, "));
}

SMATTN_LIBRARY_IMPL(SMATTN_NAMESPACE, SMATTN_DEVICE_KEY, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("attention_map", TORCH_BOX(&attention_map));
  library.impl("attention_map_backward", TORCH_BOX(&attention_map_backward));
}

#ifdef SMATTN_EMULATED
STABLE_TORCH_LIBRARY_FRAGMENT(smattn_cuda_emulated, library) {
  library.def("run_kernels(bool on) -> ()");
  library.def("run_kernels_by(int interpreter) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(smattn_cuda_emulated, CompositeExplicitAutograd, library) {
  library.impl("run_kernels", TORCH_BOX(&run_kernels));
  library.impl("run_kernels_by", TORCH_BOX(&run_kernels_by));
}
#endif
