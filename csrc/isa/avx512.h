// The 16 lanes of the avx512 targets: compiled with -mavx512f and the others of
// CMakeLists.txt; or, to test them on a CPU without (LORA_ENGINE_AVX512_ON_AVX2),
// with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include <cstdint>

#define LE_W 16
#ifdef __AVX512F__
#define LE_FMA(a, b, c) reinterpret_cast<F>(_mm512_fmadd_ps((a), (b), (c)))
#define LE_FMA_WIDE(a, b, c) reinterpret_cast<D>(_mm512_fmadd_pd((a), (b), (c)))
// With a mask of ones: GCC 12 takes the unmasked forms for reads of the uninitialised.
#define LE_WIDEN_LOW(v) _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (v), 0))
#define LE_WIDEN_HIGH(v) _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (v), 1))
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
using WideLanes = double __attribute__((vector_size(64)));
union WideHalves {
  WideLanes whole;
  __m256d half[2];
};
inline WideLanes fma_wide_halves(WideLanes a, WideLanes b, WideLanes c) {
  WideHalves x{a}, y{b}, z{c};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_pd(x.half[i], y.half[i], z.half[i]);
  return z.whole;
}
inline WideLanes widen_floats(__m256 v) {
  WideHalves to;
  to.half[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
  to.half[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  return to.whole;
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
#define LE_FMA_WIDE(a, b, c) fma_wide_halves((a), (b), (c))
#define LE_WIDEN_LOW(v) widen_floats(Halves{v}.half[0])
#define LE_WIDEN_HIGH(v) widen_floats(Halves{v}.half[1])
#define LE_WIDEN_FLOAT16(h) widen_halves(h)
#define LE_ROUND_FLOAT16(v) round_halves(v)
#endif
