#define SMATTN_UNIT baseline
#define SMATTN_UNIT_NAME "baseline"
#include "cpu/isa/unit.h"
