/* Fuzzed: the arrays of a packed matrix, in memory of exactly their sizes. */
#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* n bytes of the input, again from its start where it ends. */
static void *taken(const uint8_t *data, size_t size, size_t n) {
  unsigned char *to = malloc(n ? n : 1);
  for (size_t i = 0; i < n; ++i) to[i] = size ? data[i % size] : 0;
  return to;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static le_context *ctx;
  if (!ctx) ctx = new_context(1);
  if (size < 8) return 0;
  le_nf4 w = {0};
  w.rows = data[0] % 40 - 1, w.cols = data[1] % 80 - 1;
  w.blocksize = data[2] & 1 ? 32 << data[2] % 9 : data[2];
  w.nested_blocksize = data[3] & 1 ? 1 << data[3] % 10 : data[3] - 8;
  memcpy(&w.nested_offset, data + 4, 4);
  int64_t elements = w.rows > 0 && w.cols > 0 ? w.rows * w.cols : 1;
  int64_t blocks = w.blocksize > 0 ? (elements + w.blocksize - 1) / w.blocksize : 1;
  int64_t outer =
      w.nested_blocksize > 0 ? (blocks + w.nested_blocksize - 1) / w.nested_blocksize : 1;
  data += 8, size -= 8;
  void *packed = taken(data, size, (size_t)(elements + 1) / 2),
       *codes = taken(data, size, (size_t)blocks);
  void *absmax = taken(data, size, (size_t)blocks * 4),
       *nested = taken(data, size, (size_t)outer * 4);
  void *map = taken(data, size, 1024);
  w.packed = packed;
  if (size && data[0] & 1) {
    w.absmax = absmax;
  } else {
    w.absmax_codes = codes, w.nested_absmax = nested, w.nested_map = map;
  }
  Array back = array(LE_FLOAT32, w.rows > 0 ? w.rows : 1, w.cols > 0 ? w.cols : 1);
  Array x = drawn(LE_FLOAT32, 2, back.cols, -1, 1), y = array(LE_FLOAT32, 2, back.rows),
        again = copy_of(&back);
  le_status status = le_nf4_decode(ctx, &w, &back.c);
  if (status != LE_OK && status != LE_ERROR_VALUE) abort();
  if (status == LE_OK) {
    if (le_nf4_linear(ctx, &x.c, &w, NULL, NULL, NULL, NULL, -1, &y.c) != LE_OK) abort();
    if (le_nf4_linear_backward(ctx, &y.c, &w, &x.c) != LE_OK) abort();
    if (le_nf4_decode(ctx, &w, &again.c) != LE_OK || !same(&back, &again)) abort();
  } else if (!same(&back, &again)) {
    abort();
  }
  /* Encoding what was decoded: refused where it is not finite, else within the buffers. */
  if (status == LE_OK) le_nf4_encode(ctx, &back.c, w.blocksize, packed, absmax);
  array_free(&back), array_free(&x), array_free(&y), array_free(&again);
  free(packed), free(codes), free(absmax), free(nested), free(map);
  return 0;
}
