#define SMATTN_LEVEL baseline
#define SMATTN_LEVEL_NAME "baseline"
#include "cpu/level.h"
