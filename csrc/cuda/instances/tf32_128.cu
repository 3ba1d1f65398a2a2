#include "../instantiate.h"

namespace smattn::cuda {
template Passes passes<Tf32Math, 128>();
}
