#include "check.h"

long checks = 0, failures = 0;

void check_failed(const char *file, int line, const char *what) {
  ++failures;
  printf("%s:%d: %s\n", file, line, what);
}

/* xorshift32 (Marsaglia 2003): the same numbers on every run. */
static uint32_t next(void) {
  static uint32_t state = 2463534242u;
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}
int64_t draw(int64_t low, int64_t high) { return low + next() % (high - low + 1); }

uint64_t digest(uint64_t seed, const void *bytes, size_t size) { /* FNV-1a */
  const unsigned char *p = bytes;
  uint64_t h = seed ^ 14695981039346656037u;
  for (size_t i = 0; i < size; ++i) h = (h ^ p[i]) * 1099511628211u;
  return h;
}

static int64_t size_of(int32_t dtype) {
  return dtype == LE_UINT8                          ? 1
         : dtype == LE_FLOAT64                      ? 8
         : dtype == LE_FLOAT32 || dtype == LE_INT32 ? 4
                                                    : 2;
}

Array array_with_gap(int32_t dtype, int64_t rows, int64_t cols, int64_t gap) {
  Array a = {0};
  int vector = rows == 0;
  a.rows = vector ? 1 : rows;
  a.cols = cols;
  a.size = (size_t)((a.rows * (cols + gap) + 1) * size_of(dtype));
  a.bytes = malloc(a.size);
  memset(a.bytes, 0xff, a.size);
  a.c.data = a.bytes;
  a.c.ndim = vector ? 1 : 2;
  a.c.dtype = dtype;
  a.c.shape[0] = vector ? cols : rows;
  a.c.shape[1] = vector ? 0 : cols;
  a.c.strides[0] = vector ? 1 : cols + gap;
  a.c.strides[1] = vector ? 0 : 1;
  return a;
}
Array array(int32_t dtype, int64_t rows, int64_t cols) {
  return array_with_gap(dtype, rows, cols, 0);
}
Array drawn(int32_t dtype, int64_t rows, int64_t cols, double low, double high) {
  Array a = array(dtype, rows, cols);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      set(&a, i, j, (double)draw((int64_t)(low * 16), (int64_t)(high * 16)) / 16);
  return a;
}
void array_free(Array *a) { free(a->bytes); }

static unsigned char *place(const Array *a, int64_t i, int64_t j) {
  int64_t stride = a->c.ndim == 1 ? a->cols : a->c.strides[0];
  return a->bytes + (i * stride + j) * size_of(a->c.dtype);
}
static double from_half(uint16_t bits) {
  int exponent = bits >> 10 & 31, digits = bits & 1023;
  double size = exponent == 31 ? (digits ? NAN : INFINITY)
                : exponent     ? ldexp(1024 + digits, exponent - 25)
                               : ldexp(digits, -24);
  return bits & 0x8000 ? -size : size;
}
double at(const Array *a, int64_t i, int64_t j) {
  const unsigned char *p = place(a, i, j);
  if (a->c.dtype == LE_FLOAT64) {
    double v;
    memcpy(&v, p, 8);
    return v;
  }
  if (a->c.dtype == LE_INT32) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
  }
  if (a->c.dtype == LE_UINT8) return *p;
  uint32_t bits = 0;
  uint16_t half;
  if (a->c.dtype == LE_FLOAT32) {
    memcpy(&bits, p, 4);
  } else {
    memcpy(&half, p, 2);
    if (a->c.dtype == LE_FLOAT16) return from_half(half);
    bits = (uint32_t)half << 16;
  }
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
void set(Array *a, int64_t i, int64_t j, double v) {
  unsigned char *p = place(a, i, j);
  float narrow = (float)v;
  uint32_t bits;
  memcpy(&bits, &narrow, 4);
  uint16_t half = (uint16_t)(bits >> 16);
  int32_t whole = (int32_t)v;
  switch (a->c.dtype) {
    case LE_FLOAT64: memcpy(p, &v, 8); return;
    case LE_INT32: memcpy(p, &whole, 4); return;
    case LE_UINT8: *p = (unsigned char)v; return;
    case LE_FLOAT32: memcpy(p, &bits, 4); return;
    case LE_BFLOAT16: memcpy(p, &half, 2); return;
    default: { /* of a multiple of 1/16 below 64 */
      int exponent = 0;
      double digits = v == 0 ? 0 : ldexp(frexp(fabs(v), &exponent), 11);
      half = v == 0 ? 0 : (uint16_t)((exponent + 14) << 10 | ((int)digits & 1023));
      half |= v < 0 ? 0x8000 : 0;
      memcpy(p, &half, 2);
    }
  }
}
Array copy_of(const Array *a) {
  Array copy = *a;
  copy.bytes = malloc(a->size);
  memcpy(copy.bytes, a->bytes, a->size);
  copy.c.data = copy.bytes;
  return copy;
}
int same(const Array *a, const Array *b) {
  return a->size == b->size && memcmp(a->bytes, b->bytes, a->size) == 0;
}

int near(int32_t dtype, double got, double want, double size) {
  double tolerance = dtype == LE_BFLOAT16 ? 4e-3 : dtype == LE_FLOAT16 ? 1e-3 : 1e-6;
  return fabs(got - want) <= tolerance * (size + fabs(want)) + 1e-12;
}

void row_of(const Array *a, int64_t i, double *to) {
  for (int64_t j = 0; j < a->cols; ++j) to[j] = at(a, i, j);
}
void add_delta(const Array *A, const Array *B, double factor, const double *x, double *y,
               double *size) {
  for (int64_t r = 0; r < A->rows; ++r) {
    double h = 0, h_size = 0;
    for (int64_t k = 0; k < A->cols; ++k) {
      h += at(A, r, k) * x[k];
      h_size += fabs(at(A, r, k) * x[k]);
    }
    for (int64_t o = 0; o < B->rows; ++o) {
      y[o] += factor * at(B, o, r) * h;
      size[o] += fabs(factor * at(B, o, r)) * h_size;
    }
  }
}
void add_gradients(const Array *A, const Array *B, double factor, const double *x,
                   const double *grad, double *gA, double *gB) {
  for (int64_t r = 0; r < A->rows; ++r) {
    double h = 0, g = 0;
    for (int64_t k = 0; k < A->cols; ++k) h += at(A, r, k) * x[k];
    for (int64_t o = 0; o < B->rows; ++o) g += at(B, o, r) * grad[o];
    for (int64_t k = 0; k < A->cols; ++k) gA[r * A->cols + k] += factor * g * x[k];
    for (int64_t o = 0; o < B->rows; ++o) gB[o * A->rows + r] += factor * grad[o] * h;
  }
}

le_context *new_context(int32_t threads) {
  le_context_options options = LE_CONTEXT_OPTIONS;
  options.num_threads = threads;
  le_context *ctx = NULL;
  CHECK(le_context_create(&options, &ctx) == LE_OK);
  return ctx;
}
le_pool *new_pool(le_context *ctx, int64_t in, int32_t slices, const int64_t *out, int32_t dtype,
                  int32_t history) {
  le_pool_options options = {0};
  options.in_features = in;
  options.out_features = out;
  options.num_slices = slices;
  options.dtype = dtype;
  options.history = history;
  options.seed = 7;
  le_pool *pool = NULL;
  CHECK(le_pool_create(ctx, &options, &pool) == LE_OK);
  return pool;
}
int32_t add_drawn(le_pool *pool, int64_t in, int64_t out, int64_t rank, float scaling, Array *A,
                  Array *B) {
  int32_t slot = -7;
  *A = drawn(LE_FLOAT32, rank, in, -1, 1);
  *B = drawn(LE_FLOAT32, out, rank, -1, 1);
  CHECK(le_pool_add(pool, &A->c, &B->c, scaling, &slot) == LE_OK);
  return slot;
}
