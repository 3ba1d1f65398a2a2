#define SMATTN_LEVEL avx512bf16
#define SMATTN_LEVEL_NAME "avx512bf16"
#include "cpu/level.h"
