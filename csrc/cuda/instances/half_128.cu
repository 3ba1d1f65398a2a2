#include "../instantiate.h"

namespace smattn::cuda {
template Passes passes<HalfMath<Half>, 128>();
}
