// Compiled with -mavx2 -mfma.
#include <immintrin.h>
#define LE_W 8
#define LE_FMA(a, b, c) reinterpret_cast<F>(_mm256_fmadd_ps((a), (b), (c)))
#define LE_NAME "avx2"
#define LE_TABLE kernels_avx2
#include "nf4_avx2.h"
#define LE_NF4_BFLOAT float_compute<BfloatLanes>()
#include "bodies.h"
