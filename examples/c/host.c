/* A host in C: loads an adapter, serves and teaches it. host ADAPTER */
#include <lora_engine.h>
#include <stdio.h>
#include <stdlib.h>

enum { IN = 96, OUT = 80, ROWS = 4, STEPS = 25 };

static le_context *ctx;

static void check(le_status status) {
  if (status == LE_OK) return;
  fprintf(stderr, "%s: %s\n", le_status_string(status), le_last_error(ctx));
  exit(1);
}

/* The stream: multiples of 1/16 from -1 to 1 (an LCG: Numerical Recipes). */
static uint32_t state = 1;
static void draw(float *to, int n) {
  for (int i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    to[i] = (float)((int)((state >> 8) % 33) - 16) / 16;
  }
}

/* FNV-1a */
static uint32_t digest = 2166136261u;
static void add_to_digest(const void *bytes, size_t size) {
  for (const unsigned char *p = bytes; size--; ++p) digest = (digest ^ *p) * 16777619u;
}

static le_array matrix(void *data, int64_t rows, int64_t cols) {
  le_array a = {data, {rows, cols}, {cols, 1}, 2, LE_FLOAT32, 0};
  return a;
}

static char *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) exit(2);
  *size = (size_t)ftell(file);
  rewind(file);
  char *bytes = malloc(*size + 1);
  if (!bytes || fread(bytes, 1, *size, file) != *size) exit(2);
  fclose(file);
  return bytes;
}

int main(int argc, char **argv) {
  const int64_t outs[] = {OUT};
  const char *modules[] = {"served"};
  le_pool_options options = {0};
  le_pool *pool = NULL;
  int32_t slot;
  size_t size = 0;
  if (argc != 2) return 2;
  if (le_abi_version() != LE_ABI_VERSION) return 3;
  check(le_context_create(NULL, &ctx));
  options.in_features = IN;
  options.out_features = outs;
  options.num_slices = 1;
  check(le_pool_create(ctx, &options, &pool));
  char *bytes = read_file(argv[1], &size);
  check(le_pool_import(pool, bytes, size, NULL, 2.0f, &slot));
  free(bytes);

  float x[ROWS * IN], y[ROWS * OUT], target[ROWS * OUT];
  le_array of_x = matrix(x, ROWS, IN), of_y = matrix(y, ROWS, OUT);
  const le_step step = {0.001f, 1, 1, 0, 1, NULL};
  for (int i = 0; i < STEPS; ++i) {
    uint8_t outcome;
    double norm;
    draw(x, ROWS * IN);
    draw(target, ROWS * OUT);
    check(le_pool_forward_slot(pool, slot, &of_x, 0, 0, &of_y));
    add_to_digest(y, sizeof y);
    for (int e = 0; e < ROWS * OUT; ++e) y[e] -= target[e]; /* dL/dy of 1/2 |y - target|^2 */
    check(le_pool_adapt_slot(pool, slot, &of_x, &of_y, &step, &outcome, &norm));
    if (outcome != LE_APPLIED) return 4;
  }

  check(le_pool_export(pool, slot, modules, NULL, 0, &size));
  bytes = malloc(size);
  check(le_pool_export(pool, slot, modules, bytes, size, &size));
  add_to_digest(bytes, size);
  printf("digest %08x\n", (unsigned)digest);
  free(bytes);
  le_pool_destroy(pool);
  le_context_destroy(ctx);
  return 0;
}
