// What the C++ examples share: the stream of rows, the digest, and the work itself.
#pragma once

#include <cstdint>
#include <fstream>
#include <iterator>
#include <lora_engine.hpp>
#include <stdexcept>
#include <vector>

constexpr int64_t kIn = 96, kOut = 80, kRows = 4, kSteps = 25;

// Multiples of 1/16 from -1 to 1 (an LCG: Numerical Recipes).
class Stream {
 public:
  void draw(std::vector<float> &to) {
    for (float &value : to) {
      state_ = state_ * 1664525u + 1013904223u;
      value = static_cast<float>(static_cast<int>((state_ >> 8) % 33) - 16) / 16;
    }
  }

 private:
  uint32_t state_ = 1;
};

// FNV-1a.
class Digest {
 public:
  void add(const void *bytes, size_t size) {
    for (const auto *p = static_cast<const unsigned char *>(bytes); size--; ++p)
      value = (value ^ *p) * 16777619u;
  }
  uint32_t value = 2166136261u;
};

// Serves and teaches the adapter of a file; the digest of what was served and learned.
inline uint32_t serve_and_teach(const lora_engine::Context &context, const char *path) {
  using lora_engine::matrix;
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no such file");
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  lora_engine::Pool pool(context, kIn, {kOut});
  int32_t slot = pool.import_bytes(bytes.data(), bytes.size(), nullptr, 2.0f);

  Stream stream;
  Digest digest;
  std::vector<float> x(kRows * kIn), y(kRows * kOut), target(kRows * kOut);
  const le_step step{0.001f, 1, 1, 0, 1, nullptr};
  for (int64_t i = 0; i < kSteps; ++i) {
    stream.draw(x);
    stream.draw(target);
    pool.forward(slot, matrix(x.data(), kRows, kIn), matrix(y.data(), kRows, kOut));
    digest.add(y.data(), y.size() * sizeof(float));
    for (size_t e = 0; e < y.size(); ++e) y[e] -= target[e];
    if (pool.adapt(slot, matrix(x.data(), kRows, kIn), matrix(y.data(), kRows, kOut), step)
            .outcome != LE_APPLIED)
      throw std::runtime_error("nothing was learned");
  }
  const char *modules[] = {"served"};
  bytes = pool.export_bytes(slot, modules);
  digest.add(bytes.data(), bytes.size());
  return digest.value;
}
