#define SMATTN_LEVEL avx2
#define SMATTN_LEVEL_NAME "avx2"
#include "cpu/level.h"
