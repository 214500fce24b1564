// The baseline of whatever CPU this is compiled for: 128-bit vectors, no FMA.
#define LE_W 4
#define LE_FMA(a, b, c) ((a) * (b) + (c))
#define LE_FMA_WIDE(a, b, c) ((a) * (b) + (c))
#define LE_NAME "generic"
#define LE_TABLE kernels_generic
#include "nf4_generic.h"
#define LE_NF4_BFLOAT float_compute<FloatLanes>()
#include "bodies.h"
