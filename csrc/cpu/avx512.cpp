#define SMATTN_LEVEL avx512
#define SMATTN_LEVEL_NAME "avx512"
#include "cpu/level.h"
