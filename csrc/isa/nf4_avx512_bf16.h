// NF4 products in bfloat16 on AVX512-BF16: 64 packed bytes are 32 lanes of 16 bits with
// four nibbles each, which index a table of bfloat16 codes without a mask, since the
// table is there twice and bit 4 of the index does not matter.
#pragma once

#include "nf4_bodies.h"

namespace le {
namespace {

using Words = uint16_t __attribute__((vector_size(64)));
typedef uint16_t WordsMem __attribute__((vector_size(64), aligned(2), may_alias));

constexpr uint16_t kBfloatCodes[32] = {
    0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c,
    0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80, 0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d,
    0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80};

#ifdef __AVX512BF16__
LE_INLINE Words bfloat_codes(Words index) {
  return reinterpret_cast<Words>(_mm512_maskz_permutexvar_epi16(
      ~__mmask32(0), reinterpret_cast<__m512i>(index), _mm512_loadu_si512(kBfloatCodes)));
}
// acc + the products of the 16 pairs of bfloat16 of a and b.
LE_INLINE F dot_pairs(F acc, Words a, Words b) {
  return reinterpret_cast<F>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
#else
LE_INLINE Words bfloat_codes(Words index) {
  Words r;
  for (int i = 0; i < 32; ++i) r[i] = kBfloatCodes[index[i] & 31];
  return r;
}
LE_INLINE F dot_pairs(F acc, Words a, Words b) {
  U x = reinterpret_cast<U>(a), y = reinterpret_cast<U>(b);
  const U high = set1u(0xffff0000u);
  acc = fma(reinterpret_cast<F>(x & high), reinterpret_cast<F>(y & high), acc);
  return fma(reinterpret_cast<F>(x << 16), reinterpret_cast<F>(y << 16), acc);
}
#endif

LE_INLINE Words load_words(const void *p) { return *static_cast<const WordsMem *>(p); }
LE_INLINE Words load_words(const void *p, int64_t bytes) {
  Words w = {};
  std::memcpy(&w, p, static_cast<size_t>(bytes));
  return w;
}

// ---- few rows of x ------------------------------------------------------------

void to_pair_lanes(const float *x, int64_t chunks, void *to) {
  Bf16 *lanes = static_cast<Bf16 *>(to);
  int64_t elements = chunks * kNf4Chunk;
  for (int64_t first = 0; first < elements; first += 2 * kNf4Chunk)
    for (int v = 0; v < 4; ++v)
      for (int i = 0; i < 32; ++i, ++lanes) {
        int64_t e = first + 4 * i + nibble_element(v);
        uint32_t bits = 0;
        if (e < elements) std::memcpy(&bits, x + e, sizeof bits);
        lanes->bits = static_cast<uint16_t>(bits >> 16);
      }
}

// The scales of the lanes of two chunks; of the first alone with `last`.
template <bool HALVES>
LE_INLINE F pair_scales(const float *s, bool last) {
  if (!HALVES) return half_scales(s[0], last ? 0.0f : s[1]);
  const U quarter = iota() % 8u;
  F first = quarter < 4u ? set1(s[0]) : set1(s[1]);
  F second = last ? F{} : quarter < 4u ? set1(s[2]) : set1(s[3]);
  return iota() < 8u ? first : second;
}

template <int M, bool HALVES>
LE_INLINE void pair_dots(const Bf16 *const *x, const uint8_t *packed, int64_t chunks,
                         const float *scales, float *to, bool first) {
  F total[M] = {};
  if (!first)
    for (int i = 0; i < M; ++i) total[i] = load(to + i * W);
  for (int64_t c = 0; c < chunks; c += 2) {
    bool last = c + 1 == chunks;
    const uint8_t *p = packed + c * kNf4ChunkBytes;
    Words words = last ? load_words(p, kNf4ChunkBytes) : load_words(p);
    F acc[M] = {};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      Words codes = bfloat_codes(words >> (4 * v));
      for (int i = 0; i < M; ++i)
        acc[i] = dot_pairs(acc[i], codes, load_words(x[i] + c * kNf4Chunk + 32 * v));
    }
    F scale = pair_scales<HALVES>(scales + (HALVES ? 2 * c : c), last);
    for (int i = 0; i < M; ++i) total[i] = fma(acc[i], scale, total[i]);
  }
  for (int i = 0; i < M; ++i) store(to + i * W, total[i]);
}

template <bool HALVES>
LE_INLINE void pair_dots_by_m(int64_t m, const Bf16 *const *x, const uint8_t *packed,
                              int64_t chunks, const float *scales, float *acc, bool first) {
  if (m == 1) pair_dots<1, HALVES>(x, packed, chunks, scales, acc, first);
  if (m == 2) pair_dots<2, HALVES>(x, packed, chunks, scales, acc, first);
  if (m == 3) pair_dots<3, HALVES>(x, packed, chunks, scales, acc, first);
  if (m == 4) pair_dots<4, HALVES>(x, packed, chunks, scales, acc, first);
}

void row_pair_dots(int64_t m, const void *const *lanes, const uint8_t *packed, int64_t chunks,
                   Nf4Scales scales, float *acc, bool first) {
  const Bf16 *const *x = reinterpret_cast<const Bf16 *const *>(lanes);
  if (scales.halves)
    pair_dots_by_m<true>(m, x, packed, chunks, scales.values, acc, first);
  else
    pair_dots_by_m<false>(m, x, packed, chunks, scales.values, acc, first);
}

// ---- many rows --------------------------------------------------------------

void decode_bfloat(const uint8_t *packed, int64_t chunks, Nf4Scales scales, void *to) {
  Bf16 *dst = static_cast<Bf16 *>(to);
  float wide[kNf4Chunk];
  for (int64_t c = 0; c < chunks; ++c, packed += kNf4ChunkBytes, dst += kNf4Chunk) {
    decode(packed, 1, {scales.values + (scales.halves ? 2 * c : c), scales.halves}, wide);
    for (int v = 0; v < kVectors; ++v) store(dst + v * W, load(wide + v * W));
  }
}

template <int MT>
LE_INLINE void pair_dots_tile(const Bf16 *const *x, const Bf16 *const *w, int64_t k, float *to,
                              bool first) {
  constexpr int N = static_cast<int>(kNf4TileRows);
  F acc[MT][N] = {};
  if (!first)
    for (int i = 0; i < MT; ++i)
      for (int j = 0; j < N; ++j) acc[i][j] = load(to + (i * N + j) * W);
  auto add = [&](auto &&words) {
    Words wv[N];
    for (int j = 0; j < N; ++j) wv[j] = words(w[j]);
    for (int i = 0; i < MT; ++i) {
      Words xv = words(x[i]);
      for (int j = 0; j < N; ++j) acc[i][j] = dot_pairs(acc[i][j], xv, wv[j]);
    }
  };
  int64_t p = 0;
  for (; p + 32 <= k; p += 32) add([p](const Bf16 *row) { return load_words(row + p); });
  if (p < k) add([p, k](const Bf16 *row) { return load_words(row + p, 2 * (k - p)); });
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < N; ++j) store(to + (i * N + j) * W, acc[i][j]);
}

void dots_bfloat(int64_t m, const void *const *x_rows, const void *const *tile, int64_t k,
                 float *acc, bool first) {
  const Bf16 *const *x = reinterpret_cast<const Bf16 *const *>(x_rows);
  const Bf16 *const *w = reinterpret_cast<const Bf16 *const *>(tile);
  in_tiles(m, [&](auto count, int64_t i) {
    pair_dots_tile<count>(x + i, w, k, acc + i * kNf4TileRows * W, first);
  });
}

constexpr Nf4Compute kPairCompute = {LE_BFLOAT16,   kNf4Chunk * 2, to_pair_lanes,
                                     row_pair_dots, decode_bfloat, dots_bfloat};

}  // namespace
}  // namespace le
