// What a call of the C ABI costs over its inner loops, at 4096, r = 2, one row, float32:
//
//   lib=$(python -m lora_engine --cmake-dir)/../..
//   cc -O2 -c tests/c/counted_malloc.c -o counted_malloc.o
//   c++ -std=gnu++17 -O2 -Icsrc -Icsrc/include -Itests/c bench/boundary.cpp counted_malloc.o
//       $lib/liblora_engine.a -pthread -o boundary && ./boundary [calls]
//
// Call and loops take turns in blocks of 200; ratios are medians over the blocks. Then the
// latencies of a million calls of forward, and the allocations that they made.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "dispatch.h"
#include "include/lora_engine.h"
extern "C" {
#include "counted_malloc.h"
}

namespace {

constexpr int64_t kIn = 4096, kOut = 4096, kRank = 2;
constexpr int kBlock = 200, kBlocks = 400;

double now() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}
void check(le_status status) {
  if (status == LE_OK) return;
  std::fprintf(stderr, "%s\n", le_last_error(nullptr));
  std::exit(1);
}
le_array row(float *data, int64_t n) { return {data, {n}, {1}, 1, LE_FLOAT32, 0}; }

struct Bench {
  le_context *ctx = nullptr;
  le_pool *pool = nullptr;
  int32_t slot = -1;
  // A and B's transpose lie one behind the other, as in the pool.
  std::vector<float> weights, x, y, grad;
  float *A, *Bt;

  Bench() : weights(kRank * (kIn + kOut) + 16), x(kIn), y(kOut), grad(kOut) {
    A = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(weights.data()) + 63) / 64 * 64);
    Bt = A + kRank * kIn;
    uint32_t state = 1;
    auto draw = [&](float *to, int64_t n, float size) {
      for (int64_t i = 0; i < n; ++i) {
        state = state * 1664525u + 1013904223u;
        to[i] = size * (static_cast<float>(state >> 8) / (1 << 23) - 1);
      }
    };
    draw(A, kRank * (kIn + kOut), 0.02f);
    draw(x.data(), kIn, 1);
    draw(grad.data(), kOut, 1e-6f);
    check(le_context_create(nullptr, &ctx));
    int64_t outs[] = {kOut};
    le_pool_options options{};
    options.in_features = kIn;
    options.out_features = outs;
    options.num_slices = 1;
    check(le_pool_create(ctx, &options, &pool));
    le_array a = {A, {kRank, kIn}, {kIn, 1}, 2, LE_FLOAT32, 0};
    le_array b = {Bt, {kOut, kRank}, {1, kOut}, 2, LE_FLOAT32, 0};
    check(le_pool_add(pool, &a, &b, 1, &slot));
  }

  void forward() {
    le_array of_x = row(x.data(), kIn), of_y = row(y.data(), kOut);
    check(le_pool_forward_slot(pool, slot, &of_x, 0, 0, &of_y));
  }
  void forward_loops(const le::Kernels &k) {
    const float *of_x = x.data();
    const void *a[kRank] = {A, A + kIn}, *b[kRank] = {Bt, Bt + kOut};
    void *of_y = y.data();
    float h[kRank];
    k.shrink[LE_FLOAT32](1, &of_x, kRank, a, kIn, kRank, h, kRank);
    k.expand[LE_FLOAT32][LE_FLOAT32](1, kRank, h, kRank, b, kOut, &of_y, 0);
  }
  void adapt() {
    le_array of_x = row(x.data(), kIn), of_grad = row(grad.data(), kOut);
    const le_step step = {1e-6f, 1, 0, 0, 1, nullptr};
    uint8_t outcome;
    double norm;
    check(le_pool_adapt_slot(pool, slot, &of_x, &of_grad, &step, &outcome, &norm));
  }
  // h and the norm of x in one pass, g and that of grad in another, then an update a row of
  // weights.
  void adapt_loops(const le::Kernels &k) {
    const float *of_x = x.data(), *of_grad = grad.data();
    const void *a[kRank + 1] = {A, A + kIn, of_x}, *b[kRank + 1] = {Bt, Bt + kOut, of_grad};
    float h[kRank + 1], g[kRank + 1];
    k.shrink[LE_FLOAT32](1, &of_x, kRank + 1, a, kIn, kRank, h, kRank + 1);
    k.shrink[LE_FLOAT32](1, &of_grad, kRank + 1, b, kOut, kRank, g, kRank + 1);
    for (int64_t j = 0; j < kRank; ++j)
      for (bool of_a : {false, true}) {
        le::Update u{};
        u.n = of_a ? kIn : kOut;
        u.src = u.dst = of_a ? A + j * kIn : Bt + j * kOut;
        u.vec = of_a ? of_x : of_grad;
        u.decay = 1;
        u.coef = 1e-6f * (of_a ? g[j] : h[j]);
        k.update[LE_FLOAT32](u);
      }
  }
};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<long>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

template <class Call, class Loops>
void compare(const char *name, Call &&call, Loops &&loops) {
  std::vector<double> calls, inner, ratios;
  auto timed = [](auto &&fn) {
    double start = now();
    for (int i = 0; i < kBlock; ++i) fn();
    return (now() - start) / kBlock;
  };
  for (int block = 0; block < kBlocks; ++block) {
    double first = block % 2 ? timed(loops) : timed(call);
    double second = block % 2 ? timed(call) : timed(loops);
    calls.push_back(block % 2 ? second : first);
    inner.push_back(block % 2 ? first : second);
    ratios.push_back(calls.back() / inner.back());
  }
  std::printf("%s: %.3f us a call, %.3f us its loops: %.3fx\n", name, median(calls), median(inner),
              median(ratios));
}

}  // namespace

int main(int argc, char **argv) {
  Bench b;
  const le::Kernels &k = le::kernels();
  std::printf("instruction set: %s\n", k.name);
  compare("forward", [&] { b.forward(); }, [&] { b.forward_loops(k); });
  compare("adapt", [&] { b.adapt(); }, [&] { b.adapt_loops(k); });
  long calls = argc > 1 ? std::atol(argv[1]) : 1000000;
  std::vector<float> us(static_cast<size_t>(calls));
  long before = malloc_total();
  for (float &t : us) {
    double start = now();
    b.forward();
    t = static_cast<float>(now() - start);
  }
  for (int i = 0; i < 1000; ++i) b.adapt();
  long allocated = malloc_total() - before;
  std::sort(us.begin(), us.end());
  auto at = [&](double part) {
    return us[static_cast<size_t>(part * static_cast<double>(us.size() - 1))];
  };
  std::printf("%ld calls of forward: p50 %.2f, p99 %.2f, p99.9 %.2f, p99.99 %.2f, most %.1f us\n",
              calls, at(0.5), at(0.99), at(0.999), at(0.9999), at(1));
  std::printf("%ld allocations in these and 1000 calls of adapt\n", allocated);
  return allocated != 0;
}
