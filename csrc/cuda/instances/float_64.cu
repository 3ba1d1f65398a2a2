#include "../instantiate.h"

namespace smattn::cuda {
template Passes passes<FloatMath, 64>();
}
