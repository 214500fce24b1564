/* Fuzzed: adapters as safetensors bytes. What is taken is exported, and imports to the same bytes.
 */
#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static const int64_t outs[] = {3, 2};
  static const char *const modules[] = {"m", "k"};
  static le_context *ctx;
  if (!ctx) ctx = new_context(1);
  /* The first byte: how many slices, and whether the modules are named. */
  int32_t slices = size && data[0] & 1 ? 2 : 1, slot = -1, again = -1;
  const char *const *named = size && data[0] & 2 && slices == 1 ? NULL : modules;
  le_pool *pool = new_pool(ctx, 4, slices, outs, LE_FLOAT32, 0);
  le_status status =
      le_pool_import(pool, size ? data + 1 : data, size ? size - 1 : 0, named, 1, &slot);
  le_pool_info info;
  if (status == LE_OK) {
    size_t bytes = 0, wrote = 0;
    if (le_pool_export(pool, slot, modules, NULL, 0, &bytes) != LE_OK) abort();
    unsigned char *first = malloc(bytes), *second = malloc(bytes);
    if (le_pool_export(pool, slot, modules, first, bytes, &wrote) != LE_OK || wrote != bytes)
      abort();
    if (le_pool_import(pool, first, bytes, modules, 1, &again) != LE_OK) abort();
    if (le_pool_export(pool, again, modules, second, bytes, &wrote) != LE_OK) abort();
    if (memcmp(first, second, bytes) != 0) abort();
    free(first), free(second);
  } else if (status != LE_ERROR_VALUE || slot != -1) {
    abort();
  }
  if (le_pool_get_info(pool, &info) != LE_OK || info.live != (status == LE_OK ? 2 : 0)) abort();
  le_pool_destroy(pool);
  return 0;
}
