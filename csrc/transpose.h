// Square blocks of a matrix turned over in registers of 16 bytes, which every target has.
#pragma once

#include <cstdint>
#include <cstring>

namespace le {

#ifdef __clang__
#define LE_SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LE_SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

// T: an unsigned integer of 16 or 32 bits.
template <class T>
struct Square {
  static constexpr int N = 16 / sizeof(T);  // rows and columns
  typedef T Row __attribute__((vector_size(16)));
  typedef Row Index;

  // The first halves of two rows, element by element in turn, and the second ones.
  static Row low(Row a, Row b) {
    if constexpr (N == 4)
      return LE_SHUFFLED(a, b, 0, 4, 1, 5);
    else
      return LE_SHUFFLED(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  }
  static Row high(Row a, Row b) {
    if constexpr (N == 4)
      return LE_SHUFFLED(a, b, 2, 6, 3, 7);
    else
      return LE_SHUFFLED(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }

  // to[i][j] = from[j][i]; strides in elements.
  static void transpose(const T *from, int64_t from_stride, T *to, int64_t to_stride) {
    Row rows[N];
    for (int i = 0; i < N; ++i) std::memcpy(&rows[i], from + i * from_stride, 16);
    for (int half = N / 2; half > 0; half /= 2) {
      Row next[N];
      for (int i = 0; i < N / 2; ++i) {
        next[2 * i] = low(rows[i], rows[i + N / 2]);
        next[2 * i + 1] = high(rows[i], rows[i + N / 2]);
      }
      std::memcpy(rows, next, sizeof rows);
    }
    for (int i = 0; i < N; ++i) std::memcpy(to + i * to_stride, &rows[i], 16);
  }
};

#undef LE_SHUFFLED

}  // namespace le
