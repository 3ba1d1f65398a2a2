#include "../passes_of.h"

namespace smattn::cuda {
template Passes passes<Tf32Math, 64>();
}
