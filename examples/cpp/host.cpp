// A host in C++. host ADAPTER
#include <cstdio>

#include "stream.hpp"

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  try {
    std::printf("digest %08x\n", serve_and_teach(lora_engine::Context(), argv[1]));
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
