// What one call of a kernel is given: plain structs, filled by the binding (or a test driver), understood by every kernel in csrc.
// Formula numbers (1)..(10) are those of smattn/reference.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace smattn {

// The accumulation dtype ("acc") is float64 when query is float64 and float32 otherwise.

struct Sizes {
  int64_t B;    // batch
  int64_t H;    // query heads
  int64_t Hkv;  // key and value heads; H % Hkv == 0, query head h reads kv head h / (H / Hkv)
  int64_t Nq;   // queries
  int64_t Nk;   // keys
  int64_t D;    // head size of query and key
  int64_t Dv;   // head size of value
};

// A strided tensor that is only read. Strides count elements; any value, 0 and negative included.
struct Tensor4 {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};
};

// Which mask each batch element reads. The batch is two axes, outer and inner, and a mask has either, both or neither:
// batch element b = (b / inner, b % inner) reads the mask at (outer|0, inner|0). Int is int64_t, or int where a GPU divides.
struct MaskBatch {
  int64_t inner = 1;          // size of the inner axis of the batch
  int64_t size[2] = {1, 1};   // the mask's own sizes on the two, outer|1 and inner|1; masks = size[0] * size[1]
  int64_t stride[2] = {0, 0};  // the mask's strides on them, 0 on an axis of size 1, in place of Tensor4's first

  SMATTN_HOST_DEVICE constexpr int64_t masks() const { return size[0] * size[1]; }
  // The number, in [0, masks), of the mask that batch element b reads.
  template <class Int>
  SMATTN_HOST_DEVICE constexpr Int mask_of(Int b) const {
    const Int length = static_cast<Int>(inner), outer = size[0] > 1 ? b / length : 0;
    return size[1] > 1 ? outer * static_cast<Int>(size[1]) + b % length : outer;
  }
  SMATTN_HOST_DEVICE constexpr int64_t offset_of(int64_t mask) const { return mask / size[1] * stride[0] + mask % size[1] * stride[1]; }
  // offset_of(mask_of(b)), by one division
  template <class Int>
  SMATTN_HOST_DEVICE constexpr int64_t offset_at(Int b) const {
    const Int length = static_cast<Int>(inner), outer = b / length;
    return outer * stride[0] + (b - outer * length) * stride[1];
  }
  // The batch elements in an order in which those that share a mask are neighbours, share_step() apart; the first ones of
  // neighbouring masks are own_step() apart.
  SMATTN_HOST_DEVICE constexpr int64_t sharers(int64_t batch) const { return masks() == 0 ? 0 : batch / masks(); }
  SMATTN_HOST_DEVICE constexpr int64_t own_step(int64_t batch) const { return size[1] == 1 ? sharers(batch) : 1; }
  SMATTN_HOST_DEVICE constexpr int64_t share_step() const { return size[1] == 1 ? 1 : masks(); }
  SMATTN_HOST_DEVICE constexpr int64_t at_place(int64_t place, int64_t batch) const {
    return place / sharers(batch) * own_step(batch) + place % sharers(batch) * share_step();
  }
};

// Everything that decides the scores (1) and the softmax (2).
struct Scores {
  Sizes size;
  DType dtype;                // of query, key, value, out and their gradients
  Tensor4 query;              // [B, H, Nq, D]
  Tensor4 key;                // [B, Hkv, Nk, D]
  Tensor4 mask;               // [masks, H|1, Nq|1, Nk], data null when there is none; stride 0 on an axis of size 1. See MaskBatch.
  MaskBatch mask_batch;
  bool mask_is_logits;        // then M = sigmoid(mask), and dmask is the gradient of the logits
  int64_t mask_size[3];       // sizes of mask's first three axes
  const void* alpha;          // [H] acc, null without a mask
  int64_t alpha_stride;
  const bool* padding;        // [B, Nk], true = not attended; null when there is none
  int64_t padding_stride[2];
  double scale;
};

struct Dropout {
  double p = 0.0;             // 0: none
  uint64_t seed = 0;
};

struct ForwardParams {
  Scores scores;
  Tensor4 value;              // [B, Hkv, Nk, Dv]
  Dropout dropout;
  void* out;                  // [B, H, Nq, Dv] dtype, contiguous
  void* lse;                  // [B, H, Nq] acc, contiguous
  void* remainder;            // [B, H, Nq, Dv] RemainderOf the dtype, contiguous; null when not asked for
  void* mbar;                 // [B, H, Nq] acc, contiguous; null when not asked for
  void* normalizer;           // [B, H, Nq, 2] acc, contiguous: m and 1/l of (2), with S in base 2, +inf and 0 in a dead row; or null
};

// A gradient that was not asked for has a null pointer.
struct BackwardParams {
  Scores scores;
  Tensor4 value;              // [B, Hkv, Nk, Dv]
  Dropout dropout;
  Tensor4 dout;               // [B, H, Nq, Dv]
  const void* out;            // [B, H, Nq, Dv] dtype, contiguous; null: delta (5) is summed as P*dP
  const void* remainder;      // [B, H, Nq, Dv] RemainderOf the dtype, contiguous; null where rounding took nothing from out
  const void* lse;            // [B, H, Nq] acc, contiguous; read where there is no normalizer, else it may be null
  const void* dlse;           // [B, H, Nq] acc, contiguous; null when lse was not used
  const void* mbar;           // [B, H, Nq] acc, contiguous; read for dalpha
  const void* normalizer;     // [B, H, Nq, 2] acc, contiguous; or null
  void* dquery;               // [B, H, Nq, D] dtype, contiguous
  void* dkey;                 // [B, Hkv, Nk, D] dtype, contiguous
  void* dvalue;               // [B, Hkv, Nk, Dv] dtype, contiguous
  void* dmask;                // [masks, H|1, Nq|1, Nk] mask's dtype, contiguous
  void* dalpha;               // [H] acc, contiguous
};

struct MapParams {
  Scores scores;
  const void* head_weights;   // [H] acc, contiguous
  void* map;                  // [B, Nq, Nk] acc, contiguous
  void* lse;                  // [B, H, Nq] acc, contiguous
  void* normalizer;           // [B, H, Nq, 2] acc, contiguous; or null
};

struct MapBackwardParams {
  Scores scores;
  const void* head_weights;   // [H] acc, contiguous
  Tensor4 dmap;               // [B, 1, Nq, Nk] acc
  const void* lse;            // [B, H, Nq] acc, contiguous; read where there is no normalizer, else it may be null
  const void* normalizer;     // [B, H, Nq, 2] acc, contiguous; or null
  void* dquery;               // [B, H, Nq, D] dtype, contiguous
  void* dkey;                 // [B, Hkv, Nk, D] dtype, contiguous
  void* dmask;                // [masks, H|1, Nq|1, Nk] mask's dtype, contiguous
  void* dalpha;               // [H] acc, contiguous
  void* dhead_weights;        // [H] acc, contiguous
};

}  // namespace smattn
