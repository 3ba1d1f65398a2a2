#include "../passes_of.h"

namespace smattn::cuda {
template Passes passes<FloatMath, 32>();
}
