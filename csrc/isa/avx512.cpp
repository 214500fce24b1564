#include "avx512.h"
#define LE_NAME "avx512"
#define LE_TABLE kernels_avx512
#include "nf4_avx512.h"
#define LE_NF4_BFLOAT float_compute<FloatLanes>()
#include "bodies.h"
