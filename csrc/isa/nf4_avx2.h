// NF4 codes on AVX2: each byte of a code is looked up on its own (pshufb has 16
// entries of one byte), then the bytes are interleaved into numbers.
#pragma once

#include <immintrin.h>

#include "nf4_bytes.h"
#include "nf4_kernels.h"
#include "vec.h"

namespace le {
namespace {

LE_INLINE __m256i table(const uint8_t *bytes) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(bytes)));
}

// The index of every even element (high nibbles), then of every odd one.
struct Nibbles {
  __m256i half[2];
  explicit Nibbles(__m256i packed) {
    const __m256i mask = _mm256_set1_epi8(15);
    half[0] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
    half[1] = _mm256_and_si256(packed, mask);
  }
};
LE_INLINE __m256i load_chunk(const uint8_t *p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}

// 32 indices to 4 vectors: vector j has entries 4j to 4j + 3 of each 128-bit lane.
LE_INLINE void look_up(__m256i index, F *c) {
  __m256i b0 = _mm256_shuffle_epi8(table(kFloatBytes[0]), index);
  __m256i b1 = _mm256_shuffle_epi8(table(kFloatBytes[1]), index);
  __m256i b2 = _mm256_shuffle_epi8(table(kFloatBytes[2]), index);
  __m256i b3 = _mm256_shuffle_epi8(table(kFloatBytes[3]), index);
  __m256i low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1);
  __m256i low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
  c[0] = reinterpret_cast<F>(_mm256_unpacklo_epi16(low01, low23));
  c[1] = reinterpret_cast<F>(_mm256_unpackhi_epi16(low01, low23));
  c[2] = reinterpret_cast<F>(_mm256_unpacklo_epi16(high01, high23));
  c[3] = reinterpret_cast<F>(_mm256_unpackhi_epi16(high01, high23));
}

// 16-bit words to the low 128 bits where even, to the high ones where odd: the
// interleaving within lanes then gives the order of the tensor.
LE_INLINE void natural_codes(const uint8_t *p, F *c) {
  const __m256i words = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load_chunk(p), words), 0xd8);
  Nibbles n(sorted);
  look_up(_mm256_unpacklo_epi8(n.half[0], n.half[1]), c);
  look_up(_mm256_unpackhi_epi8(n.half[0], n.half[1]), c + 4);
}

struct FloatLanes {
  static constexpr int element(int v, int lane) {
    return 2 * (4 * (v % 4) + lane % 4 + 16 * (lane / 4)) + v / 4;
  }
  template <class Use>
  static LE_INLINE void each(const uint8_t *p, Use &&use) {
    Nibbles n(load_chunk(p));
    for (int half = 0; half < 2; ++half) {
      F c[4];
      look_up(n.half[half], c);
      for (int j = 0; j < 4; ++j) use(4 * half + j, c[j]);
    }
  }
};

// A pair of 16-bit codes lies in each 32 bits: a shift gives the even one as a
// float32, a mask the odd one.
struct BfloatLanes {
  static constexpr int element(int v, int lane) {
    int byte = 8 * (v / 2 % 2) + 2 * (lane % 4) + v % 2 + 16 * (lane / 4);
    return 2 * byte + v / 4;
  }
  template <class Use>
  static LE_INLINE void each(const uint8_t *p, Use &&use) {
    const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    Nibbles n(load_chunk(p));
    for (int half = 0; half < 2; ++half) {
      __m256i b0 = _mm256_shuffle_epi8(table(kBfloatBytes[0]), n.half[half]);
      __m256i b1 = _mm256_shuffle_epi8(table(kBfloatBytes[1]), n.half[half]);
      __m256i pairs[2] = {_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)};
      for (int j = 0; j < 2; ++j) {
        use(4 * half + 2 * j, reinterpret_cast<F>(_mm256_slli_epi32(pairs[j], 16)));
        use(4 * half + 2 * j + 1, reinterpret_cast<F>(_mm256_and_si256(pairs[j], odd)));
      }
    }
  }
};

}  // namespace
}  // namespace le
