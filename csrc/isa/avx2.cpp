// Compiled with -mavx2 -mfma -mf16c.
#include <immintrin.h>
#define LE_W 8
#define LE_FMA(a, b, c) reinterpret_cast<F>(_mm256_fmadd_ps((a), (b), (c)))
#define LE_FMA_WIDE(a, b, c) reinterpret_cast<D>(_mm256_fmadd_pd((a), (b), (c)))
#define LE_WIDEN_LOW(v) _mm256_cvtps_pd(_mm256_castps256_ps128(v))
#define LE_WIDEN_HIGH(v) _mm256_cvtps_pd(_mm256_extractf128_ps((v), 1))
#define LE_WIDEN_FLOAT16(h) reinterpret_cast<F>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)))
#define LE_ROUND_FLOAT16(v) reinterpret_cast<H>(_mm256_cvtps_ph((v), _MM_FROUND_TO_NEAREST_INT))
#define LE_NAME "avx2"
#define LE_TABLE kernels_avx2
#include "nf4_avx2.h"
#define LE_NF4_BFLOAT float_compute<BfloatLanes>()
#include "bodies.h"
