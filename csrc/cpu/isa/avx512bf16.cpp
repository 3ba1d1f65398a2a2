#define SMATTN_UNIT avx512bf16
#define SMATTN_UNIT_NAME "avx512bf16"
#include "cpu/isa/bfloat16_unit.h"
