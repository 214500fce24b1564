// avx512 with the processor's own rounding to bfloat16, which flushes subnormals.
#include "avx512.h"
#ifdef __AVX512BF16__
#define LE_ROUND_BFLOAT16(v) reinterpret_cast<H>(_mm512_cvtneps_pbh(v))
#endif
#define LE_NAME "avx512_bf16"
#define LE_TABLE kernels_avx512_bf16
#include "nf4_avx512.h"
#include "nf4_avx512_bf16.h"
#define LE_NF4_BFLOAT kPairCompute
#include "bodies.h"
