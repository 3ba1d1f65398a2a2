#include "../instantiate.h"

namespace smattn::cuda {
template Passes passes<HalfMath<BFloat16>, 64>();
}
