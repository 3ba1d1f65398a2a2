#define SMATTN_UNIT avx2
#define SMATTN_UNIT_NAME "avx2"
#include "cpu/isa/unit.h"
