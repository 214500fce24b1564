#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace le {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows f16c.
[[maybe_unused]] bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
#ifdef LE_AVX512_ON_AVX2
[[maybe_unused]] bool has_avx512() { return has_avx2(); }
[[maybe_unused]] bool has_avx512_bf16() { return has_avx2(); }
#else
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif
#endif

const Kernels *choose() {
  const char *wanted = std::getenv("LORA_ENGINE_ISA");
  const Kernels *best = nullptr;
  for (const IsaEntry *e = isa_table; e->kernels; ++e) {
    if (wanted && *wanted && std::strcmp(wanted, e->kernels->name) != 0) continue;
    if (e->supported()) {
      best = e->kernels;
    } else if (wanted && *wanted) {
      fail(LE_ERROR_UNSUPPORTED, "LORA_ENGINE_ISA=%s: this CPU does not have it", wanted);
    }
  }
  if (!best) {
    std::string built;
    for (const IsaEntry *e = isa_table; e->kernels; ++e)
      built += (built.empty() ? "" : ", ") + std::string(e->kernels->name);
    fail(LE_ERROR_UNSUPPORTED, "LORA_ENGINE_ISA=%s: expected one of %s", wanted, built.c_str());
  }
  return best;
}

}  // namespace

const IsaEntry isa_table[] = {
    {&kernels_generic, always},
#ifdef LE_ISA_AVX2
    {&kernels_avx2, has_avx2},
#endif
#ifdef LE_ISA_AVX512
    {&kernels_avx512, has_avx512},
#endif
#ifdef LE_ISA_AVX512_BF16
    {&kernels_avx512_bf16, has_avx512_bf16},
#endif
#ifdef LE_ISA_NEON
    {&kernels_neon, always},
#endif
    {nullptr, nullptr},
};

const Kernels &kernels() {
  static std::atomic<const Kernels *> chosen{nullptr};
  const Kernels *k = chosen.load(std::memory_order_acquire);
  if (!k) {
    k = choose();
    chosen.store(k, std::memory_order_release);
  }
  return *k;
}

}  // namespace le
