#define SMATTN_UNIT avx512
#define SMATTN_UNIT_NAME "avx512"
#include "cpu/isa/unit.h"
