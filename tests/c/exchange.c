/* Adapters as safetensors bytes, tensors of DLPack. */
#include "check.h"

enum { in = 12, rank = 3 };

static void round_trip(le_context *ctx, int32_t dtype) {
  const int64_t outs[] = {5, 4, 7};
  const char *modules[] = {"layers.0.q_proj", NULL, "layers.0.v_\"\\\n\xc3\xa9"};
  const char *all[] = {modules[0], "layers.0.k_proj", modules[2]};
  le_pool *pool = new_pool(ctx, in, 3, outs, dtype, 0), *to = new_pool(ctx, in, 3, outs, dtype, 0);
  Array A0 = drawn(LE_FLOAT32, rank, in, -1, 1), B0 = drawn(LE_FLOAT32, 5, rank, -1, 1);
  Array A2 = drawn(LE_FLOAT32, 1, in, -1, 1), B2 = drawn(LE_FLOAT32, 7, 1, -1, 1);
  le_array A[3] = {A0.c, {0}, A2.c}, B[3] = {B0.c, {0}, B2.c};
  int32_t slot = -1, again = -1, ranks[3];
  size_t size = 0, wrote = 0;
  CHECK(le_pool_add(pool, A, B, 0.5f, &slot) == LE_OK);
  CHECK(le_pool_export(pool, slot, modules, NULL, 0, &size) == LE_OK && size > 8);
  char *bytes = malloc(size + 1), *second = malloc(size);
  memset(bytes, 0x55, size + 1);
  REFUSED(ctx, LE_ERROR_VALUE, "capacity",
          le_pool_export(pool, slot, modules, bytes, size - 1, &wrote));
  CHECK(wrote == size && bytes[0] == 0x55);
  CHECK(le_pool_export(pool, slot, modules, bytes, size, &wrote) == LE_OK && wrote == size);
  CHECK(bytes[size] == 0x55);
  CHECK(memcmp(bytes + 8, "{\"base_model.model.layers.0.q_proj.lora_A.weight\":{\"dtype\":\"",
               60) == 0);

  CHECK(le_pool_import(to, bytes, size, all, 0.5f, &again) == LE_OK && again == 0);
  CHECK(le_pool_ranks(to, again, ranks) == LE_OK && ranks[0] == rank && ranks[1] == 0 &&
        ranks[2] == 1);
  CHECK(le_pool_export(to, again, all, second, size, &wrote) == LE_OK);
  CHECK(memcmp(bytes, second, size) == 0);

  /* Bytes at any address. */
  memmove(bytes + 1, bytes, size);
  CHECK(le_pool_import(to, bytes + 1, size, all, 0.5f, &again) == LE_OK && again == 1);
  CHECK(le_pool_export(to, again, all, second, size, &wrote) == LE_OK);
  CHECK(memcmp(bytes + 1, second, size) == 0);

  /* Cut anywhere, it is refused, and nothing is added. */
  le_pool_info before, after;
  CHECK(le_pool_get_info(to, &before) == LE_OK);
  for (size_t cut = 0; cut < size; ++cut)
    CHECK(le_pool_import(to, bytes + 1, cut, all, 0.5f, &again) == LE_ERROR_VALUE);
  CHECK(le_pool_get_info(to, &after) == LE_OK && after.bytes == before.bytes && again == 1);
  free(bytes), free(second);
  array_free(&A0), array_free(&B0), array_free(&A2), array_free(&B2);
  le_pool_destroy(pool), le_pool_destroy(to);
}

/* A file of one header and zeros for data. */
static le_status import_text(le_pool *pool, const char *header, size_t data,
                             const char *const *modules, int32_t *slot) {
  size_t length = strlen(header);
  unsigned char *bytes = calloc(8 + length + data, 1);
  for (int i = 0; i < 8; ++i) bytes[i] = (unsigned char)(length >> 8 * i);
  memcpy(bytes + 8, header, length);
  le_status status = le_pool_import(pool, bytes, 8 + length + data, modules, 1, slot);
  free(bytes);
  return status;
}

#define A_KEY "\"base_model.model.m.lora_A.weight\""
#define B_KEY "\"base_model.model.m.lora_B.weight\""
#define A_AT "{\"dtype\":\"F32\",\"shape\":[1,12],\"data_offsets\":[0,48]}"
#define B_AT "{\"dtype\":\"F32\",\"shape\":[5,1],\"data_offsets\":[48,68]}"

static const struct {
  const char *header;
  int data;
  const char *words;
} hostile[] = {
    {"", 0, "expected '{'"},
    {"[]", 0, "expected '{'"},
    {"{}", 0, "missing"},
    {"{} x", 0, "expected the end of the header"},
    {"{" A_KEY ":" A_AT "}", 48, "lora_B.weight: missing"},
    {"{" A_KEY ":" A_AT "," B_KEY ":" B_AT "}", 72, "expected 68 bytes of data, got 72"},
    {"{" A_KEY ":" A_AT "," B_KEY ":" B_AT "}", 67, "expected offsets in 0..67"},
    {"{" A_KEY ":" A_AT "," A_KEY ":" B_AT "}", 68, "expected once, got twice"},
    {"{" A_KEY ":" A_AT "," B_KEY ":{\"dtype\":\"F32\",\"shape\":[5,1],\"data_offsets\":[44,64]}}",
     64, "without holes"},
    {"{" A_KEY ":{\"dtype\":\"F31\",\"shape\":[1,12],\"data_offsets\":[0,48]}}", 48,
     "dtype of safetensors"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[1,13],\"data_offsets\":[0,48]}}", 48,
     "as many bytes as"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", 0,
     "as many bytes as"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[9223372036854775808],\"data_offsets\":[0,0]}}", 0,
     "within int64"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,0]}}", 0,
     "expected a whole number"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[01],\"data_offsets\":[0,4]}}", 4,
     "expected a whole number"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4,
     "expected fewer numbers"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4]}}", 4,
     "expected two offsets"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "each once"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"more\":1}}", 4, "each once"},
    {"{" A_KEY ":{\"shape\":[1],\"shape\":[1]}}", 4, "each once"},
    {"{\"__metadata__\":{\"a\":1}}", 0, "expected '\"'"},
    {"{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "expected each key once"},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "expected __metadata__ once"},
    {"{\"\\x\":{}}", 0, "expected an escape"},
    {"{\"\\ud800\":{}}", 0, "half a surrogate pair"},
    {"{\"\\udc00\":{}}", 0, "half a surrogate pair"},
    {"{\"\\u12g4\":{}}", 0, "four hexadecimal digits"},
    {"{\"\xff\":{}}", 0, "expected UTF-8"},
    {"{\"\xc0\xaf\":{}}", 0, "expected UTF-8"},
    {"{\"\xed\xa0\x80\":{}}", 0, "expected UTF-8"},
    {"{\"a\nb\":{}}", 0, "expected the end of a text"},
    {"{\"a", 0, "expected the end of a text"},
    {"{" A_KEY ":{\"dtype\":\"I32\",\"shape\":[1,12],\"data_offsets\":[0,48]}," B_KEY ":" B_AT "}",
     68, "a matrix of F32"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[12],\"data_offsets\":[0,48]}," B_KEY ":" B_AT "}",
     68, "a matrix of F32"},
    {"{" A_KEY ":{\"dtype\":\"F32\",\"shape\":[2,6],\"data_offsets\":[0,48]}," B_KEY ":" B_AT "}",
     68, "expected shape [r, in]"},
    {"{\"other\":" A_AT "}", 48, "expected keys like base_model.model."},
};

static void refused(le_context *ctx) {
  const int64_t outs[] = {5};
  const char *module[] = {"m"}, *bad[] = {"\xff"}, *empty[] = {""}, *none[] = {NULL};
  le_pool *pool = new_pool(ctx, in, 1, outs, LE_FLOAT32, 0);
  int32_t slot = -3;
  for (size_t i = 0; i < sizeof hostile / sizeof *hostile; ++i) {
    int own = strstr(hostile[i].words, "keys like") != NULL;
    REFUSED(
        ctx, LE_ERROR_VALUE, hostile[i].words,
        import_text(pool, hostile[i].header, (size_t)hostile[i].data, own ? NULL : module, &slot));
  }
  const char *good = "{\"__metadata__\":{\"format\":\"\\u0070\\ud83d\\ude00t\"} ,\n" A_KEY ":" A_AT
                     "," B_KEY ":" B_AT "}  ";
  REFUSED(ctx, LE_ERROR_VALUE, "UTF-8", import_text(pool, good, 68, bad, &slot));
  REFUSED(ctx, LE_ERROR_VALUE, "1 to 4096 bytes", import_text(pool, good, 68, empty, &slot));
  REFUSED(ctx, LE_ERROR_VALUE, "modules: expected a pointer",
          import_text(pool, good, 68, none, &slot));
  le_pool_info info;
  CHECK(le_pool_get_info(pool, &info) == LE_OK && info.live == 0 && slot == -3);
  CHECK(import_text(pool, good, 68, module, &slot) == LE_OK && slot == 0);
  CHECK(import_text(pool, good, 68, NULL, &slot) == LE_OK && slot == 1);
  unsigned char huge[16] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, '{'};
  REFUSED(ctx, LE_ERROR_VALUE, "header: expected at most 8 bytes",
          le_pool_import(pool, huge, 16, module, 1, &slot));
  /* NaN among the weights. */
  size_t size = 0;
  CHECK(le_pool_export(pool, 0, module, NULL, 0, &size) == LE_OK);
  unsigned char *bytes = malloc(size);
  CHECK(le_pool_export(pool, 0, module, bytes, size, &size) == LE_OK);
  bytes[size - 1] = 0x7f, bytes[size - 2] = 0xc0;
  REFUSED(ctx, LE_ERROR_VALUE, "expected finite numbers",
          le_pool_import(pool, bytes, size, module, 1, &slot));
  free(bytes);
  le_pool_destroy(pool);
}

/* As dlpack.h has it. */
typedef struct Tensor {
  void *data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

static void dlpack(le_context *ctx) {
  Array x = drawn(LE_FLOAT32, 3, in, -1, 1), A = drawn(LE_FLOAT32, 1, in, -1, 1);
  Array B = drawn(LE_FLOAT32, 2, 1, -1, 1), y = array(LE_FLOAT32, 2, 2),
        plain = array(LE_FLOAT32, 2, 2);
  int64_t shape[5] = {2, in, 1, 1, 1}, strides[2] = {in, 1};
  Tensor t = {x.c.data, {1, 0}, 2, {2, 32, 1}, shape, NULL, in * sizeof(float)};
  le_array a, rows = x.c;
  rows.data = (float *)x.c.data + in, rows.shape[0] = 2;
  CHECK(le_array_from_dltensor(&t, &a) == LE_OK);
  CHECK(a.data == rows.data && a.ndim == 2 && a.shape[1] == in && a.strides[0] == in &&
        a.strides[1] == 1);
  CHECK(le_lora_delta(ctx, &a, &A.c, &B.c, 1, 0, &y.c) == LE_OK);
  CHECK(le_lora_delta(ctx, &rows, &A.c, &B.c, 1, 0, &plain.c) == LE_OK);
  CHECK(same(&y, &plain));
  t.strides = strides, strides[0] = -in;
  CHECK(le_array_from_dltensor(&t, &a) == LE_OK && a.strides[0] == -in);
  const struct {
    uint8_t code, bits;
    int32_t dtype;
  } dtypes[] = {{2, 16, LE_FLOAT16},
                {4, 16, LE_BFLOAT16},
                {2, 64, LE_FLOAT64},
                {0, 32, LE_INT32},
                {1, 8, LE_UINT8}};
  for (int i = 0; i < 5; ++i) {
    t.dtype.code = dtypes[i].code, t.dtype.bits = dtypes[i].bits;
    CHECK(le_array_from_dltensor(&t, &a) == LE_OK && a.dtype == dtypes[i].dtype);
  }
  t.dtype.bits = 64;
  REFUSED(NULL, LE_ERROR_TYPE, "code 1 of 64 bits", le_array_from_dltensor(&t, &a));
  t.dtype.bits = 8, t.dtype.lanes = 4;
  REFUSED(NULL, LE_ERROR_TYPE, "4 lanes", le_array_from_dltensor(&t, &a));
  t.dtype.lanes = 1, t.device.type = 2;
  REFUSED(NULL, LE_ERROR_UNSUPPORTED, "device type 2", le_array_from_dltensor(&t, &a));
  t.device.type = 1, t.ndim = 5;
  REFUSED(NULL, LE_ERROR_VALUE, "0 to 4 dimensions", le_array_from_dltensor(&t, &a));
  t.ndim = 2, shape[0] = -1;
  REFUSED(NULL, LE_ERROR_VALUE, "sizes from 0", le_array_from_dltensor(&t, &a));
  shape[0] = shape[1] = INT64_C(1) << 62;
  REFUSED(NULL, LE_ERROR_VALUE, "that fit in memory", le_array_from_dltensor(&t, &a));
  REFUSED(NULL, LE_ERROR_VALUE, "dltensor: expected a pointer", le_array_from_dltensor(NULL, &a));
  REFUSED(NULL, LE_ERROR_VALUE, "out: expected a pointer", le_array_from_dltensor(&t, NULL));
  array_free(&x), array_free(&A), array_free(&B), array_free(&y), array_free(&plain);
}

void test_exchange(void) {
  le_context *ctx = new_context(1);
  for (int32_t dtype = LE_FLOAT32; dtype <= LE_FLOAT16; ++dtype) round_trip(ctx, dtype);
  refused(ctx);
  dlpack(ctx);
  le_context_destroy(ctx);
}
