// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#include <immintrin.h>
#define LE_W 16
#define LE_FMA(a, b, c) reinterpret_cast<F>(_mm512_fmadd_ps((a), (b), (c)))
#define LE_NAME "avx512"
#define LE_TABLE kernels_avx512
#include "bodies.h"
