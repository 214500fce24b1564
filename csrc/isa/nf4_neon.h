// NF4 codes on NEON: each byte of a code is looked up on its own (tbl has 16 entries of
// one byte), then the bytes are interleaved into numbers.
#pragma once

#include <arm_neon.h>

#include "nf4_bytes.h"
#include "nf4_kernels.h"
#include "vec.h"

namespace le {
namespace {

// The index of every even element (high nibbles), then of every odd one.
struct Nibbles {
  uint8x16_t half[2];
  explicit Nibbles(uint8x16_t packed)
      : half{vshrq_n_u8(packed, 4), vandq_u8(packed, vdupq_n_u8(15))} {}
};

// 16 indices to 4 vectors, in order.
LE_INLINE void look_up(uint8x16_t index, F *c) {
  uint8x16_t b0 = vqtbl1q_u8(vld1q_u8(kFloatBytes[0]), index);
  uint8x16_t b1 = vqtbl1q_u8(vld1q_u8(kFloatBytes[1]), index);
  uint8x16_t b2 = vqtbl1q_u8(vld1q_u8(kFloatBytes[2]), index);
  uint8x16_t b3 = vqtbl1q_u8(vld1q_u8(kFloatBytes[3]), index);
  uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1));
  uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
  uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3));
  uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
  c[0] = reinterpret_cast<F>(vzip1q_u16(low01, low23));
  c[1] = reinterpret_cast<F>(vzip2q_u16(low01, low23));
  c[2] = reinterpret_cast<F>(vzip1q_u16(high01, high23));
  c[3] = reinterpret_cast<F>(vzip2q_u16(high01, high23));
}

LE_INLINE void natural_codes(const uint8_t *p, F *c) {
  for (int part = 0; part < 2; ++part, p += 16, c += 8) {
    Nibbles n(vld1q_u8(p));
    look_up(vzip1q_u8(n.half[0], n.half[1]), c);
    look_up(vzip2q_u8(n.half[0], n.half[1]), c + 4);
  }
}

struct FloatLanes {
  static constexpr int element(int v, int lane) {
    return 2 * (8 * (v / 8) + 2 * (v % 4) + lane % 2 + 16 * (lane / 2)) + v / 4 % 2;
  }
  // Pairs of bytes of the chunk's halves take turns, so that a vector has two lanes of each.
  template <class Use>
  static LE_INLINE void each(const uint8_t *p, Use &&use) {
    uint16x8_t first = vreinterpretq_u16_u8(vld1q_u8(p));
    uint16x8_t second = vreinterpretq_u16_u8(vld1q_u8(p + 16));
    const uint16x8_t parts[2] = {vzip1q_u16(first, second), vzip2q_u16(first, second)};
    for (int part = 0; part < 2; ++part) {
      Nibbles n(vreinterpretq_u8_u16(parts[part]));
      for (int half = 0; half < 2; ++half) {
        F c[4];
        look_up(n.half[half], c);
        for (int j = 0; j < 4; ++j) use(8 * part + 4 * half + j, c[j]);
      }
    }
  }
};

// A pair of 16-bit codes lies in each 32 bits: a shift gives the even one as a
// float32, a mask the odd one. Fours of bytes of the chunk's halves take turns.
struct BfloatLanes {
  static constexpr int element(int v, int lane) {
    int byte = 8 * (v / 8) + 4 * (v / 2 % 2) + 2 * (lane % 2) + v % 2 + 16 * (lane / 2);
    return 2 * byte + v / 4 % 2;
  }
  template <class Use>
  static LE_INLINE void each(const uint8_t *p, Use &&use) {
    const uint32x4_t odd = vdupq_n_u32(0xffff0000u);
    uint32x4_t first = vreinterpretq_u32_u8(vld1q_u8(p));
    uint32x4_t second = vreinterpretq_u32_u8(vld1q_u8(p + 16));
    const uint32x4_t parts[2] = {vzip1q_u32(first, second), vzip2q_u32(first, second)};
    for (int part = 0; part < 2; ++part) {
      Nibbles n(vreinterpretq_u8_u32(parts[part]));
      for (int half = 0; half < 2; ++half) {
        uint8x16_t b0 = vqtbl1q_u8(vld1q_u8(kBfloatBytes[0]), n.half[half]);
        uint8x16_t b1 = vqtbl1q_u8(vld1q_u8(kBfloatBytes[1]), n.half[half]);
        const uint32x4_t pairs[2] = {vreinterpretq_u32_u8(vzip1q_u8(b0, b1)),
                                     vreinterpretq_u32_u8(vzip2q_u8(b0, b1))};
        for (int j = 0; j < 2; ++j) {
          int v = 8 * part + 4 * half + 2 * j;
          use(v, reinterpret_cast<F>(vshlq_n_u32(pairs[j], 16)));
          use(v + 1, reinterpret_cast<F>(vandq_u32(pairs[j], odd)));
        }
      }
    }
  }
};

}  // namespace
}  // namespace le
