/* Runs the groups that are named, or all; prints what failed, and how many checks there were. */
#include "check.h"

static const struct {
  const char *name;
  void (*run)(void);
} groups[] = {{"context", test_context},   {"ops", test_ops},          {"pool", test_pool},
              {"learning", test_learning}, {"ewc", test_ewc},          {"nf4", test_nf4},
              {"exchange", test_exchange}, {"refusals", test_refusals}};

int main(int argc, char **argv) {
  printf("instruction set: %s\n", le_isa() ? le_isa() : le_last_error(NULL));
  for (size_t g = 0; g < sizeof groups / sizeof *groups; ++g) {
    int wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted |= strcmp(argv[i], groups[g].name) == 0;
    long before = checks;
    if (wanted) groups[g].run();
    if (wanted) printf("%s: %ld checks\n", groups[g].name, checks - before);
  }
  printf("%ld checks, %ld failed\n", checks, failures);
  return failures != 0 || checks == 0;
}
