// What the kernels are given: plain structs with device pointers, filled by plan.cpp.
#pragma once

#include "../params.h"

namespace smattn::cuda {

// What every kernel of a call is given.
struct Call {
  Scores scores;
  Tensor4 value = {};
  bool query_aligned = false, key_aligned = false, value_aligned = false;  // Rows::aligned
  const int64_t* seed = nullptr;  // of dropout, in device memory
  uint32_t drop_below = 0;  // dropout_threshold, 0 without dropout
  float keep_scale = 1.0f;  // 1/(1-p)
};

// Of a row over one range of keys: not yet divided by l.
struct alignas(16) PartialRow {
  float m;  // largest score, base 2
  float l;  // sum of exp2(s - m); 0 where no key is live and where live scores are all -inf
  float average[2];  // sums of P*M and P*dA
};

struct ForwardArgs {
  Call call;
  Tensor4 dmap = {};  // (B, 1, Nq, Nk) of (10), data null in attention itself
  int64_t splits = 1;  // ranges of keys
  int64_t split_keys = 1;  // a range's length, a multiple of the key tile
  void* out = nullptr;  // ForwardParams
  void* remainder = nullptr;
  float *lse = nullptr, *mbar = nullptr, *eta = nullptr;  // (B, H, Nq), null when not asked for
  float* normalizer = nullptr;  // (B, H, Nq, 2), null when not asked for
  float* partial_out = nullptr;  // (splits, B, H, Nq, Dv)
  PartialRow* partial_rows = nullptr;  // (splits, B, H, Nq)
};

// What every pass of backward reads of a query row, Math::RowState; one load. P is rebuilt from lse where products round it to 16 bits or
// TF32, else from the normalizer: an lse's own rounding is in every P of its row, and over thousands of keys of small scores dV would have
// too much of it.
struct alignas(8) LseState {
  float shift;  // lse in base 2; +inf in dead rows and past the last: P is 0 there
  float delta = 0.0f;  // (5); for attention_map w_h * eta of (10)
};
struct alignas(16) NormalizerState {
  float shift;  // the row's largest score in base 2; +inf in dead rows and past the last
  float delta = 0.0f;
  float factor = 0.0f;  // 1/l; 0 in dead rows and past the last
  float unused = 0.0f;  // to 16 bytes, which an asynchronous copy can move
};

struct RowsArgs {
  Call call;
  Tensor4 dout = {};
  const void *out = nullptr, *remainder = nullptr;  // BackwardParams; null where sums takes their place
  const float *lse = nullptr, *dlse = nullptr;  // (B, H, Nq); dlse may be null
  const float* normalizer = nullptr;  // (B, H, Nq, 2), may be null
  const float* sums = nullptr;  // (B, H, Nq): of P*dP for (5), or eta of (10)
  const float* head_weights = nullptr;  // of attention_map
  void* rows = nullptr;  // Math::RowState (B, H, Nq)
  bool normalized = false;  // it is NormalizerState
};

// What is summed over heads in `tile`.
enum class TileSum : int32_t { kNone, kMaskGradient, kMap };

struct KeysArgs {
  Call call;
  Tensor4 dout = {};  // data null in attention_map
  bool dout_aligned = false;
  Tensor4 dmap = {};  // (B, 1, Nq, Nk), data null in attention
  const float* head_weights = nullptr;  // (H,) of attention_map
  const void* rows = nullptr;  // Math::RowState (B, H, Nq)
  void *dkey = nullptr, *dvalue = nullptr;  // null when not asked for
  TileSum tile_sum = TileSum::kNone;
  void* tile_out = nullptr;  // dmask (Bm, Hm, Nq, Nk) in mask's dtype, or map (B, Nq, Nk) float32
  DType tile_dtype = DType::kFloat32;
  bool tile_per_head = false;  // dmask has a head axis
  void* row_out = nullptr;  // dM of a mask without a query axis, summed over queries (B / batches, H or Hkv, Nk); null when not asked for
  DType row_dtype = DType::kFloat32;
  bool row_is_final = false;  // it is dM itself, each row one block's: not to be summed, but to go through the sigmoid of logits
  bool row_per_head = false;  // a row for each head, else for each group of query heads
  int64_t heads = 1,
          batches = 1;  // that a block goes over, the last one fewer batches; whole groups of query heads when dK or dV is asked for
  int64_t span = 1;  // queries that a block goes over
};

struct QueriesArgs {
  Call call;
  Tensor4 dout = {};  // data null in attention_map
  bool dout_aligned = false;
  Tensor4 dmap = {};  // (B, 1, Nq, Nk), data null in attention
  const float* head_weights = nullptr;  // (H,) of attention_map
  const void* rows = nullptr;  // Math::RowState (B, H, Nq)
  int64_t splits = 1, split_keys = 1;  // ranges of keys, a range's length
  void* dquery = nullptr;  // null when not asked for
  float* partial_dquery = nullptr;  // (splits, B, H, Nq, D)
  float* dalpha = nullptr;  // (B, H, query blocks * splits) partial sums, null when not asked for
  const float *mbar = nullptr, *dlse = nullptr;  // (B, H, Nq), for dalpha; dlse may be null
  float* delta = nullptr;  // (splits, B, H, Nq) sums of P*dP; when given, nothing else is computed
};

// to[o, p, i] = sum over r, s of from[r * stride_r + s * stride_s + o * stride_o + p * stride_p + i], with logits through their sigmoid
struct SumArgs {
  const float* from = nullptr;
  void* to = nullptr;  // contiguous (outer, middle, inner)
  DType dtype = DType::kFloat32;
  int64_t outer = 1, middle = 1, inner = 1, stride_outer = 1, stride_middle = 1;
  int64_t first = 1, second = 1, stride_first = 1, stride_second = 1;  // what is summed over
  Tensor4 logits = {};  // [outer, middle, 1, inner], data null where `to` is no gradient of logits
  MaskBatch logits_batch = {};
};

}  // namespace smattn::cuda
