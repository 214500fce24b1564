// AArch64: 128-bit vectors with FMA and float16 conversions, which every such CPU has.
#include <arm_neon.h>
#define LE_W 4
#define LE_FMA(a, b, c) \
  reinterpret_cast<F>(vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define LE_FMA_WIDE(a, b, c) \
  reinterpret_cast<D>(vfmaq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#define LE_WIDEN_FLOAT16(h) reinterpret_cast<F>(vcvt_f32_f16((float16x4_t)(h)))
#define LE_ROUND_FLOAT16(v) reinterpret_cast<H>(vcvt_f16_f32((float32x4_t)(v)))
#define LE_NAME "neon"
#define LE_TABLE kernels_neon
#include "nf4_neon.h"
#define LE_NF4_BFLOAT float_compute<BfloatLanes>()
#include "bodies.h"
