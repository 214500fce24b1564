// The 16 lanes of the avx512 targets: compiled with -mavx512f and the others of
// CMakeLists.txt; or, to test them on a CPU without (LORA_ENGINE_AVX512_ON_AVX2),
// with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include <cstdint>

#define LE_W 16
#ifdef __AVX512F__
#define LE_FMA(a, b, c) reinterpret_cast<F>(_mm512_fmadd_ps((a), (b), (c)))
// With a mask of ones: GCC 12 takes the unmasked forms for reads of the uninitialised.
#define LE_WIDEN_FLOAT16(h) \
  reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)))
#define LE_ROUND_FLOAT16(v) \
  reinterpret_cast<H>(_mm512_maskz_cvtps_ph(0xffff, (v), _MM_FROUND_TO_NEAREST_INT))
#else
namespace {
using Lanes = float __attribute__((vector_size(64)));
using Packed = uint16_t __attribute__((vector_size(32)));
union Halves {
  Lanes whole;
  __m256 half[2];
};
union PackedHalves {
  Packed whole;
  __m128i half[2];
};
inline Lanes fma_halves(Lanes a, Lanes b, Lanes c) {
  Halves x{a}, y{b}, z{c};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.whole;
}
inline Lanes widen_halves(Packed h) {
  PackedHalves from{h};
  Halves to;
  for (int i = 0; i < 2; ++i) to.half[i] = _mm256_cvtph_ps(from.half[i]);
  return to.whole;
}
inline Packed round_halves(Lanes v) {
  Halves from{v};
  PackedHalves to;
  for (int i = 0; i < 2; ++i) to.half[i] = _mm256_cvtps_ph(from.half[i], _MM_FROUND_TO_NEAREST_INT);
  return to.whole;
}
}  // namespace
#define LE_FMA(a, b, c) fma_halves((a), (b), (c))
#define LE_WIDEN_FLOAT16(h) widen_halves(h)
#define LE_ROUND_FLOAT16(v) round_halves(v)
#endif
