// A matrix in NF4, checked, and the two ends of the format: encode and decode.
#pragma once

#include <numeric>

#include "arrays.h"
#include "context.h"

namespace le {

// Reads a borrowed le_nf4 in chunks of 64 elements of the flat tensor.
class Nf4Matrix {
 public:
  Nf4Matrix(const char *op, const le_nf4 *w);

  int64_t rows() const { return w_.rows; }
  int64_t cols() const { return w_.cols; }
  int64_t elements() const { return w_.rows * w_.cols; }
  int64_t packed_bytes() const { return (elements() + 1) / 2; }
  // A row lies in whole chunks, from `offset` elements into the first of them.
  struct Run {
    int64_t first, count, offset;
  };
  Run run(int64_t row) const {
    int64_t at = row * w_.cols, end = at + w_.cols;
    return {at / kNf4Chunk, (end + kNf4Chunk - 1) / kNf4Chunk - at / kNf4Chunk, at % kNf4Chunk};
  }
  // All offsets are multiples of this, and no row lies in more chunks than that.
  int64_t offset_step() const { return std::gcd(w_.cols, kNf4Chunk); }
  int64_t longest_run() const {
    return (w_.cols + kNf4Chunk - offset_step() + kNf4Chunk - 1) / kNf4Chunk;
  }
  // `count` chunks: in place, or in `memory` where the last of them lacks bytes.
  const uint8_t *chunks(int64_t first, int64_t count, Scratch<uint8_t> &memory) const;

  // The scales of chunks [first, first + count), read in place where they lie so.
  Nf4Scales scales(int64_t first, int64_t count, Scratch<float> &memory) const;

  // Elements [first, last) of the flat tensor, decoded: a pointer to element `first`.
  struct Buffers {
    Scratch<float> scales, values;
  };
  template <class T>
  const T *decode(void (*kernel)(const uint8_t *, int64_t, Nf4Scales, void *), int64_t first,
                  int64_t last, T *to, Buffers &b) const {
    int64_t begin = first / kNf4Chunk, end = (last + kNf4Chunk - 1) / kNf4Chunk;
    Nf4Scales s = scales(begin, end - begin, b.scales);
    int64_t whole = (end < whole_chunks_ ? end : whole_chunks_) - begin;
    if (whole > 0) kernel(chunk(begin), whole, s, to);
    if (end > whole_chunks_) {
      int64_t at = whole_chunks_ - begin;
      kernel(tail_, 1, {s.values + (s.halves ? 2 * at : at), s.halves}, to + at * kNf4Chunk);
    }
    return to + (first - begin * kNf4Chunk);
  }
  // Room that decode needs for a run of so many elements, wherever it begins.
  static int64_t room(int64_t elements) { return elements + 2 * kNf4Chunk; }

  // Raises where an output shares memory with the matrix.
  void check_apart(const char *op, const char *arg, const Rows &out) const;

 private:
  const uint8_t *chunk(int64_t c) const { return w_.packed + c * kNf4ChunkBytes; }
  void absmax(int64_t first, int64_t count, float *to) const;

  const le_nf4 w_;
  int64_t blocks_ = 0;
  int64_t whole_chunks_ = 0;      // those with all their bytes
  uint8_t tail_[kNf4ChunkBytes];  // the last chunk, where it is not whole
};

void nf4_encode(Context &context, const le_array *W, int32_t blocksize, uint8_t *packed,
                float *absmax);
void nf4_decode(Context &context, const le_nf4 *w, const le_array *W);

}  // namespace le
