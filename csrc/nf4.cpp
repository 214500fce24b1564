#include "nf4.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "dispatch.h"

namespace le {
namespace {

constexpr int64_t kTaskElements = 1 << 16;  // of one task of encode and decode

void check_blocksize(const char *op, int64_t size) {
  if (size < 32 || size > 4096 || (size & (size - 1)))
    fail(LE_ERROR_VALUE, "%s: blocksize: expected a power of two from 32 to 4096, got %lld", op,
         static_cast<long long>(size));
}

// Calls visit(row, first column, count, offset) for the parts of rows that elements
// [first, last) of the flat tensor lie in.
template <class Visit>
void each_part(int64_t cols, int64_t first, int64_t last, Visit &&visit) {
  for (int64_t at = first; at < last;) {
    int64_t row = at / cols, column = at % cols, count = std::min(cols - column, last - at);
    visit(row, column, count, at - first);
    at += count;
  }
}

void check_scales(const char *op, const char *arg, const float *scales) {
  if (reinterpret_cast<uintptr_t>(scales) % alignof(float))
    fail(LE_ERROR_VALUE, "%s: %s: expected scales at addresses that 4 divides, got %p", op, arg,
         static_cast<const void *>(scales));
}

// As rows, for check_overlap.
Rows bytes_at(const void *data, int64_t bytes) {
  return {const_cast<char *>(static_cast<const char *>(data)), 1, bytes, bytes, 1, LE_UINT8};
}

}  // namespace

Nf4Matrix::Nf4Matrix(const char *op, const le_nf4 *w) : w_(w ? *w : le_nf4{}) {
  if (!w) fail(LE_ERROR_VALUE, "%s: w: expected an NF4 matrix, got NULL", op);
  constexpr int64_t kMost = int64_t(1) << 48;
  if (w_.rows < 1 || w_.cols < 1 || w_.rows > kMost / w_.cols)
    fail(LE_ERROR_VALUE,
         "%s: w: expected rows and cols from 1, 2^48 elements at most, got [%lld, %lld]", op,
         static_cast<long long>(w_.rows), static_cast<long long>(w_.cols));
  check_blocksize(op, w_.blocksize);
  bool nested = !w_.absmax;
  if (!w_.packed || (nested && !(w_.absmax_codes && w_.nested_absmax && w_.nested_map)))
    fail(LE_ERROR_VALUE, "%s: w: expected codes and scales, got NULL", op);
  for (const float *scales : {w_.absmax, w_.nested_absmax, w_.nested_map})
    check_scales(op, "w", scales);
  if (nested && w_.nested_blocksize < 1)
    fail(LE_ERROR_VALUE, "%s: w: nested_blocksize: expected 1 or more, got %d", op,
         w_.nested_blocksize);
  blocks_ = (elements() + w_.blocksize - 1) / w_.blocksize;
  whole_chunks_ = packed_bytes() / kNf4ChunkBytes;
  int64_t rest = packed_bytes() % kNf4ChunkBytes;
  std::memset(tail_, 0x77, sizeof tail_);
  std::memcpy(tail_, chunk(whole_chunks_), static_cast<size_t>(rest));
}

const uint8_t *Nf4Matrix::chunks(int64_t first, int64_t count, Scratch<uint8_t> &memory) const {
  if (first + count <= whole_chunks_) return chunk(first);
  uint8_t *to = memory.get(count * kNf4ChunkBytes);
  int64_t whole = std::max<int64_t>(whole_chunks_ - first, 0) * kNf4ChunkBytes;
  std::memcpy(to, chunk(first), static_cast<size_t>(whole));
  std::memcpy(to + whole, tail_, sizeof tail_);
  return to;
}

// absmax of blocks [first, first + count), zeros beyond the last block.
void Nf4Matrix::absmax(int64_t first, int64_t count, float *to) const {
  int64_t there = std::min(count, blocks_ - first);
  for (int64_t i = 0; i < there && w_.absmax; ++i) to[i] = w_.absmax[first + i];
  for (int64_t i = 0; i < there && !w_.absmax;) {
    int64_t nested = (first + i) / w_.nested_blocksize;
    int64_t end = std::min(there, (nested + 1) * w_.nested_blocksize - first);
    float scale = w_.nested_absmax[nested], offset = w_.nested_offset;
    for (; i < end; ++i) {
      float product = w_.nested_map[w_.absmax_codes[first + i]] * scale;
      to[i] = product + offset;
    }
  }
  for (int64_t i = there; i < count; ++i) to[i] = 0;
}

Nf4Scales Nf4Matrix::scales(int64_t first, int64_t count, Scratch<float> &memory) const {
  bool halves = w_.blocksize < kNf4Chunk;
  int shift = halves ? 0 : __builtin_ctz(static_cast<unsigned>(w_.blocksize / kNf4Chunk));
  int64_t block = halves ? 2 * first : first >> shift;
  int64_t blocks = halves ? 2 * count : ((first + count - 1) >> shift) - block + 1;
  if (w_.absmax && shift == 0 && block + blocks <= blocks_) return {w_.absmax + block, halves};
  float *to = memory.get(blocks + count);
  absmax(block, blocks, to);
  if (shift == 0) return {to, halves};
  float *chunk = to + blocks;
  for (int64_t i = 0; i < count; ++i) chunk[i] = to[((first + i) >> shift) - block];
  return {chunk, halves};
}

void Nf4Matrix::check_apart(const char *op, const char *arg, const Rows &out) const {
  auto check = [&](const void *data, int64_t bytes) {
    if (data) check_overlap(op, arg, out, "w", bytes_at(data, bytes));
  };
  int64_t nested = w_.absmax ? 0 : (blocks_ + w_.nested_blocksize - 1) / w_.nested_blocksize;
  check(w_.packed, packed_bytes());
  check(w_.absmax, 4 * blocks_);
  check(w_.absmax_codes, w_.absmax ? 0 : blocks_);
  check(w_.nested_absmax, 4 * nested);
  check(w_.nested_map, w_.absmax ? 0 : 4 * 256);
}

void nf4_encode(Context &context, const le_array *W, int32_t blocksize, uint8_t *packed,
                float *absmax) {
  const char *op = "nf4_quantize";
  Rows from = float_matrix(op, "W", W, -1, -1, "[rows, cols]");
  check_blocksize(op, blocksize);
  if (!packed || !absmax) fail(LE_ERROR_VALUE, "%s: expected room for the result, got NULL", op);
  check_scales(op, "absmax", absmax);
  const Kernels &k = kernels();
  int64_t total = from.n * from.width;
  Rows codes_to = bytes_at(packed, (total + 1) / 2);
  Rows scales_to = bytes_at(absmax, 4 * ((total + blocksize - 1) / blocksize));
  check_overlap(op, "packed", codes_to, "W", from);
  check_overlap(op, "absmax", scales_to, "W", from);
  check_overlap(op, "absmax", scales_to, "packed", codes_to);
  int64_t step = std::max<int64_t>(kTaskElements, blocksize);
  int threads = context.threads_for(8 * total);
  auto each_block = [&](auto &&visit) {
    context.threads.run((total + step - 1) / step, threads, [&](int64_t task) {
      LE_PER_THREAD(Scratch<float>, memory);
      int64_t end = std::min(total, (task + 1) * step);
      for (int64_t first = task * step; first < end; first += blocksize) {
        int64_t count = std::min<int64_t>(blocksize, end - first);
        float *x = memory.get(blocksize);
        each_part(from.width, first, first + count,
                  [&](int64_t row, int64_t column, int64_t n, int64_t at) {
                    load_row(k, from, row, column, n, x + at);
                  });
        visit(first, count, x, k.nf4.absmax(x, count));
      }
    });
  };
  std::atomic<int64_t> bad{total};  // the first block with one
  each_block([&](int64_t first, int64_t, const float *, float largest) {
    int64_t least = bad.load();
    while (!(largest >= 0) && first < least && !bad.compare_exchange_weak(least, first)) {
    }
  });
  if (bad < total)
    fail(LE_ERROR_VALUE, "%s: W: expected finite numbers, got NaN or Inf from row %lld on", op,
         static_cast<long long>(bad / from.width));
  each_block([&](int64_t first, int64_t count, const float *x, float largest) {
    uint8_t codes[4096 + 1];
    absmax[first / blocksize] = largest;
    if (largest > 0)
      k.nf4.encode(x, count, largest, codes);
    else
      std::memset(codes, 7, static_cast<size_t>(count));
    codes[count] = 7;  // of zero: beyond an odd end
    for (int64_t i = 0; i < count; i += 2)
      packed[(first + i) / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
  });
}

void nf4_decode(Context &context, const le_nf4 *w, const le_array *W) {
  const char *op = "nf4_dequantize";
  Nf4Matrix matrix(op, w);
  Rows to = float_matrix(op, "out", W, matrix.rows(), matrix.cols(), "[rows, cols]");
  check_output(op, "out", W, to);
  matrix.check_apart(op, "out", to);
  const Kernels &k = kernels();
  int64_t total = matrix.elements();
  context.threads.run((total + kTaskElements - 1) / kTaskElements, context.threads_for(5 * total),
                      [&](int64_t task) {
                        LE_PER_THREAD(Nf4Matrix::Buffers, b);
                        int64_t first = task * kTaskElements;
                        int64_t last = std::min(total, first + kTaskElements);
                        float *room = b.values.get_aligned(Nf4Matrix::room(kTaskElements));
                        const float *values = matrix.decode(k.nf4.decode, first, last, room, b);
                        each_part(to.width, first, last,
                                  [&](int64_t row, int64_t column, int64_t n, int64_t at) {
                                    store_row(k, to, row, column, n, values + at, false);
                                  });
                      });
}

}  // namespace le
