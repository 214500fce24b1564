// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl; or, to test its 16 lanes
// on a CPU without them (LORA_ENGINE_AVX512_ON_AVX2), with -mavx2 -mfma.
#include <immintrin.h>
#define LE_W 16
#ifdef __AVX512F__
#define LE_FMA(a, b, c) reinterpret_cast<F>(_mm512_fmadd_ps((a), (b), (c)))
#else
namespace {
using Lanes = float __attribute__((vector_size(64)));
union Halves {
  Lanes whole;
  __m256 half[2];
};
inline Lanes fma_halves(Lanes a, Lanes b, Lanes c) {
  Halves x{a}, y{b}, z{c};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.whole;
}
}  // namespace
#define LE_FMA(a, b, c) fma_halves((a), (b), (c))
#endif
#define LE_NAME "avx512"
#define LE_TABLE kernels_avx512
#include "nf4_avx512.h"
#define LE_NF4_BFLOAT float_compute<FloatLanes>()
#include "bodies.h"
