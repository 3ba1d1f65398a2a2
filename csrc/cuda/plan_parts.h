// What the plans of the passes share.
#pragma once

#include "../memory.h"
#include "args.h"
#include "kernels.h"

namespace smattn::cuda {

constexpr int64_t kMostPartialBytes = kPromisedBytes / 2;  // of a call's partial outputs

template <class T>
T* allocate(int64_t count, const Context& context) {
  return static_cast<T*>(context.allocate(count * static_cast<int64_t>(sizeof(T)), context.allocator));
}

// What (7) and (8) ask for, of attention and of its map alike.
struct Wanted {
  void *dquery, *dkey, *dvalue, *dmask, *dalpha;
};

// The passes over keys: dK, dV and dM.
void run_keys(KeysArgs args, const Wanted& wanted, const Passes& passes, const Context& context);

}  // namespace smattn::cuda
