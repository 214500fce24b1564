/* Runs a fuzz target on the files that are named: for compilers without libFuzzer. */
#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv) {
  for (int i = 1; i < argc; ++i) {
    FILE *file = fopen(argv[i], "rb");
    if (!file || fseek(file, 0, SEEK_END)) return 1;
    long size = ftell(file);
    rewind(file);
    uint8_t *bytes = malloc(size > 0 ? (size_t)size : 1); /* of exactly that size, for sanitizers */
    if (size < 0 || fread(bytes, 1, (size_t)size, file) != (size_t)size) return 1;
    fclose(file);
    LLVMFuzzerTestOneInput(bytes, (size_t)size);
    free(bytes);
  }
  printf("%d inputs\n", argc - 1);
  return 0;
}
