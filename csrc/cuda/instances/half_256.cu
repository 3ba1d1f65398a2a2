#include "../passes_of.h"

namespace smattn::cuda {
template Passes passes<HalfMath<Half>, 256>();
}
