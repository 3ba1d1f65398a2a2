// AVX-512 with bfloat16, and matrix tiles for its products: those of the processor, or with SMATTN_AMX=EMULATED a double of them.
#define SMATTN_UNIT amx
#define SMATTN_UNIT_NAME "amx"
#ifdef SMATTN_AMX_EMULATED
#define SMATTN_TILES SoftwareTiles
#else
#define SMATTN_TILES HardwareTiles
#endif
#include "cpu/isa/bfloat16_unit.h"

namespace smattn::cpu::amx {

template <class AnyTiles>
void multiply_in(const uint16_t* a, const uint16_t* b, float* sum) {
  AnyTiles::configure();
  AnyTiles::template load<0>(sum, kTileBytes);
  AnyTiles::template load<1>(a, kTileBytes);
  AnyTiles::template load<2>(b, kTileBytes);
  AnyTiles::template multiply_add<0, 1, 2>();
  AnyTiles::template store<0>(sum, kTileBytes);
  AnyTiles::release();
}

void multiply_tile(bool in_software, const uint16_t* a, const uint16_t* b, float* sum) {
  in_software ? multiply_in<SoftwareTiles>(a, b, sum) : multiply_in<HardwareTiles>(a, b, sum);
}

}  // namespace smattn::cpu::amx
